"""What the tests of bad input share: a small run that works, and the `nova` command in this process."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

RECIPE = """\
[run]
dir = "{run}"
[model]
num_layers = 2
hidden_size = 16
num_heads = 4
num_kv_heads = 2
ffn_hidden_size = 24
vocab_size = 300
[data]
train = "{data}"
pack_length = 128
[train]
steps = 2
global_batch_packs = 1
[log]
tensorboard = false
progress = false
"""


def good_pairs() -> str:
    rows = (
        {"prompt": f"Q {i}", "chosen": " yes" + " a" * (i % 5 + 1), "rejected": " no" + " b" * 7}
        for i in range(24)
    )
    return "".join(json.dumps(row) + "\n" for row in rows)


@dataclass(frozen=True)
class SmallRun:
    """A folder with good data, and a recipe whose run goes to `folder / "run"`."""

    folder: Path

    @property
    def dir(self) -> Path:
        return self.folder / "run"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.toml"

    @property
    def data(self) -> Path:
        return self.folder / "pairs.jsonl"

    def create(self) -> SmallRun:
        self.data.write_text(good_pairs())
        self.recipe.write_text(RECIPE.format(run=self.dir, data=self.data))
        return self

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def train(self, *settings: str) -> list[str]:
        """The arguments of `nova train` with some keys changed."""
        return ["train", str(self.recipe), *(part for key in settings for part in ("--set", key))]

    def at(self, word: str) -> str:
        """An argument with this run's places in it."""
        return word.replace("FOLDER", str(self.folder)).replace("RUN", str(self.dir))

    def results(self) -> dict[str, str]:
        """Metrics and checkpoints anywhere below the folder, with their contents' hashes."""
        files = [*self.folder.rglob("metrics.jsonl"), *self.folder.rglob("checkpoints/**/*")]
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
            if path.is_file()
        }


class Outcome(NamedTuple):
    code: int | str | None
    out: str
    err: str


@pytest.fixture
def nova(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """`nova ...` as its user types it, in this process."""
    from nova_sys import cli

    def run(*argv: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["nova", *map(str, argv)])
        monkeypatch.delenv("NOVA_DEBUG", raising=False)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return Outcome(caught.value.code, *capsys.readouterr())

    yield run
    logging.captureWarnings(False)
    root = logging.getLogger()
    for handler in [h for h in root.handlers if type(h).__module__ == "nova_sys.log"]:
        root.removeHandler(handler)


@pytest.fixture
def refuses(
    nova: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, run: SmallRun
) -> Callable[..., str]:
    """Runs a command that must be refused before the first step; gives its message.

    says: a part of what was seen, of the rule, of the remedy. Exit code 2, one error without a traceback, no step, and metrics and
    checkpoints as they were.
    """
    from nova_sys import trainer

    def step(*_: object) -> None:
        raise AssertionError("a training step ran")

    def check(*argv: object, says: tuple[str, str, str]) -> str:
        monkeypatch.setattr(trainer, "train_step", step)
        before = run.results()
        code, _, err = nova(*argv)
        message = err[f"\n{err}".rfind("\nerror: ") :]
        assert code == 2, err
        assert "Traceback" not in err and message.startswith("error: "), err
        for part in says:
            assert run.at(part) in message, (part, message)
        assert run.results() == before
        return message

    return check


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path).create()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A run that has done its two steps; to be copied by those who change it."""
    from nova_sys.train import main

    made = SmallRun(tmp_path_factory.mktemp("finished")).create()
    main([str(made.recipe)])
    return made


@pytest.fixture
def trained(finished: SmallRun, run: SmallRun) -> SmallRun:
    """`run`, after its two steps."""
    shutil.copytree(finished.dir, run.dir)
    return run
