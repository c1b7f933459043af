"""Runs in processes of their own that tests may signal and kill, and the same runs undisturbed, to compare with."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "launch" / "recipes" / "dpo_hh_small.toml"
PATIENCE_S = 240.0
STEPS = 24
SMALL = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.ffn_hidden_size": 48,
    "model.vocab_size": 320,
    "model.kv_shift": True,
    "data.pack_length": 256,
    "data.max_length": 256,
    "train.steps": STEPS,
    "train.global_batch_packs": 2,
    "optimizer.warmup_steps": 4,
    "optimizer.lr": 1e-3,
    "checkpoint.every_steps": 1,
    "log.tensorboard": False,
}
TIMES = {"tokens_per_s", "tokens_per_s_per_gpu", "pairs_per_s", "step_time_s", "data_wait_ms"}
TIMES |= {"mfu", "peak_gib"}


class Zygote:
    """The other end of zygote.py."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
        }  # no threads of libraries before a fork
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(Path(__file__).with_name("zygote.py"))],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin and self._process.stdout
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)


class Process(Protocol):
    pid: int

    def poll(self) -> int | None: ...


class Forked:
    """A rank that the zygote forked."""

    def __init__(self, zygote: Zygote, order: dict[str, Any]) -> None:
        self._zygote, self._code = zygote, None
        self.pid: int = zygote.ask(order)

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._zygote.ask({"poll": self.pid})
        return self._code


@dataclass
class Run:
    """A run folder and its settings. `processes`: those started last, a launcher or the ranks themselves.

    first: Python code that forked ranks run before anything else.
    """

    folder: Path
    settings: dict[str, Any]
    zygote: Callable[[], Zygote]
    processes: list[Process] = field(default_factory=list)
    first: str = ""

    def __post_init__(self) -> None:
        self.log = self.folder.with_name(f"{self.folder.name}.log")

    @property
    def text(self) -> str:
        return self.log.read_text()

    def start(self, nproc: int = 1, how: str = "fork") -> None:
        """The same run each time. Every process leads a process group; what they print goes into `log`.

        how: "nova", the user's command; "torchrun"; or "fork": ranks without a launcher, which start fast.
        """
        arguments = [str(RECIPE)]
        for key, value in {**self.settings, "run.dir": str(self.folder)}.items():
            arguments += ["--set", f"{key}={json.dumps(value)}"]
        self.log.unlink(missing_ok=True)
        if how == "fork":
            self.processes = [
                Forked(self.zygote(), order) for order in self._orders(arguments, nproc)
            ]
            return
        ours = ["nova_sys.cli", "train", "--nproc", str(nproc)]
        agent = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
        module = {"nova": ours, "torchrun": [*agent, "-m", "nova_sys.train"]}[how]
        with self.log.open("w") as out:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-m", *module, *arguments],
                    cwd=ROOT,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            ]

    def _orders(self, arguments: list[str], nproc: int) -> Iterator[dict[str, Any]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(nproc):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc}
            env = {k: str(v) for k, v in {**env, "MASTER_PORT": port}.items()}
            yield {
                "fork": arguments,
                "env": {**env, "MASTER_ADDR": "127.0.0.1"},
                "log": str(self.log),
                "first": self.first,
            }

    @property
    def is_over(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def until(self, condition: Callable[[], Any]) -> None:
        """Returns when the condition holds, or all processes have ended."""
        began = time.monotonic()
        while not condition() and not self.is_over:
            assert time.monotonic() - began < PATIENCE_S, self.text
            time.sleep(0.01)

    def wait(self) -> int | None:
        """The first exit code that is not 0, if any."""
        self.until(lambda: self.is_over)
        return next((code for p in self.processes if (code := p.poll())), 0)

    def finish(self, nproc: int = 1) -> None:
        self.start(nproc)
        assert self.wait() == 0, self.text

    def alive(self) -> list[psutil.Process]:
        """All that was started here or by what was started here: it is in a group, or has the run's folder on its command line."""
        groups = {process.pid for process in self.processes}
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            with suppress(ProcessLookupError):
                named = any(str(self.folder) in word for word in process.info["cmdline"] or [])
                if named or os.getpgid(process.pid) in groups:
                    found.append(process)
        return [p for p in found if p.info["status"] != psutil.STATUS_ZOMBIE]

    def rows(self) -> list[dict[str, Any]]:
        """Finished steps, without times."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]

    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step_*"))

    def assert_tidy(self) -> None:
        """No process is left, and no file that does not belong there."""
        began = time.monotonic()
        while left := self.alive():
            assert time.monotonic() - began < 30, left
            time.sleep(0.05)
        belongs = {
            ".lock",
            "run.json",
            "metrics.jsonl",
            "checkpoints",
            "tokenizer",
            "cache",
            "tensorboard",
        }
        assert {path.name for path in self.folder.iterdir()} <= belongs
        names = [path.name for path in (self.folder / "checkpoints").iterdir()]
        assert all(name.startswith("step_") for name in names), names

    def assert_same_as(self, other: Run) -> None:
        """Bit for bit: every step's numbers, and all that the last checkpoint holds."""
        ours, theirs = self.rows(), other.rows()
        assert [row["step"] for row in ours] == [*range(1, len(theirs) + 1)]
        for row, expected in zip(ours, theirs, strict=True):
            assert row == expected
        assert self.checkpoints()[-1].name == other.checkpoints()[-1].name
        assert_equal_tensors(self.checkpoints()[-1], other.checkpoints()[-1])


def assert_equal_tensors(ours: Path, theirs: Path) -> None:
    """Weights, optimizer and random states."""
    a, b = tensors(ours), tensors(theirs)
    assert a.keys() == b.keys() and any("exp_avg" in key for key in a)
    assert [key for key in a if a[key] != b[key]] == []


def tensors(checkpoint: Path) -> dict[str, bytes]:
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(checkpoint)
    entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
    state = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in entries.items()}
    load(state, storage_reader=reader, no_dist=True)
    return {key: value.numpy().tobytes() for key, value in state.items()}


def write_dialogues(path: Path, count: int) -> Path:
    """Preference pairs in the form of hh-rlhf: two whole transcripts with a common start."""
    rng = random.Random(0)

    def say(speaker: str, low: int, high: int) -> str:
        words = (
            "".join(rng.choices("abcdefgh", k=rng.randint(1, 6)))
            for _ in range(rng.randint(low, high))
        )
        return f"\n\n{speaker}: " + " ".join(words)

    with path.open("w") as out:
        for _ in range(count):
            start = "".join(
                say("Human", 2, 8) + say("Assistant", 2, 8) for _ in range(rng.randint(0, 2))
            )
            start += say("Human", 2, 8)
            answers = {
                "chosen": start + say("Assistant", 1, 15),
                "rejected": start + say("Assistant", 16, 20),
            }
            out.write(json.dumps(answers) + "\n")
    return path


@pytest.fixture(scope="session")
def zygote() -> Iterator[Callable[[], Zygote]]:
    started: list[Zygote] = []

    def get() -> Zygote:
        if not started:
            started.append(Zygote())
        return started[0]

    yield get
    for one in started:
        one.close()


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, zygote: Callable[[], Zygote]
) -> Callable[[int], Run]:
    """The run on so many ranks that nobody stopped; more than two epochs long."""
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = {
        **SMALL,
        "data.train": str(write_dialogues(folder / "dialogues.jsonl", 20)),
        "data.cache_dir": str(folder / "cache"),
    }
    done: dict[int, Run] = {}

    def run(nproc: int) -> Run:
        if nproc not in done:
            done[nproc] = Run(folder / f"ranks-{nproc}", dict(settings), zygote)
            done[nproc].finish(nproc)
            settings.setdefault("data.tokenizer", str(done[nproc].folder / "tokenizer"))
        return done[nproc]

    run(1)
    return run


@pytest.fixture
def make_run(
    tmp_path: Path, undisturbed: Callable[[int], Run], zygote: Callable[[], Zygote]
) -> Iterator[Callable[..., Run]]:
    """Runs like the undisturbed ones, which share its tokenizer and caches. Ended when the test ends."""
    like = undisturbed(1)
    same = {**like.settings, "data.tokenizer": str(like.folder / "tokenizer")}
    runs: list[Run] = []

    def make(**changes: Any) -> Run:
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        runs.append(Run(tmp_path / f"run{len(runs)}", {**same, **changes}, zygote))
        return runs[-1]

    yield make
    for process in (process for run in runs for process in run.alive()):
        process.kill()


@pytest.fixture(scope="session", name="write_dialogues")
def _write_dialogues() -> Callable[[Path, int], Path]:
    return write_dialogues
