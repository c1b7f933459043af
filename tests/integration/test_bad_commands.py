"""Bad arguments of `evaluate` and `generate`: among them outputs that are inputs, keys that would be ignored, torn checkpoints."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

spec = importlib.util.spec_from_file_location("small_run", Path(__file__).with_name("small_run.py"))
assert spec is not None and spec.loader is not None
small_run = importlib.util.module_from_spec(spec)
sys.modules["small_run"] = small_run  # dataclasses look there
spec.loader.exec_module(small_run)
nova, refuses, run = small_run.nova, small_run.refuses, small_run.run  # fixtures
finished, trained = small_run.finished, small_run.trained

Run = Any  # small_run.SmallRun
Refuses = Callable[..., str]
Says = tuple[str, str, str]
"""Parts of a refusal: what was seen, the rule, what to change."""

# fmt: off
EVALUATE: dict[str, tuple[str, Says]] = {
    "no checkpoint": ("/nowhere --data FOLDER/pairs.jsonl", ("/nowhere is not a checkpoint", "no run folder with one", "give a folder like")),
    "no pairs": ("RUN --data FOLDER/pears.jsonl", ("pears.jsonl': no such file", "data files must exist", "Did you mean FOLDER/pairs.jsonl?")),
    "no JSON": ("RUN --data FOLDER/recipe.toml", ("recipe.toml:1: not valid JSON", "each line must be one JSON object", "Correct or remove the line")),
    "no reference": ("RUN --data FOLDER/pairs.jsonl --reference FOLDER", ("FOLDER is not a checkpoint", "no run folder with one", "give a folder like")),
    "reference of another vocabulary": ("RUN --data FOLDER/pairs.jsonl --reference FOLDER/other", ("was trained with another tokenizer than the checkpoint", "an id must keep its meaning", "Name a reference with the same tokenizer")),
    "no place for the output": ("RUN --data FOLDER/pairs.jsonl --per-pair /nowhere/out.jsonl", ("--per-pair /nowhere/out.jsonl", "cannot be written", "name a file in a folder that exists")),
    "ids without a file": ("RUN --data FOLDER/pairs.jsonl --with-ids", ("--with-ids", "adds to the lines of --per-pair", "give --per-pair OUT.jsonl too")),
    "layout": ("RUN --data FOLDER/pairs.jsonl --set parallel.tensor=3", ("parallel.tensor = 3", "must divide model.num_heads = 4", "choose one of 1, 2")),
    "layout of four": ("RUN --data FOLDER/pairs.jsonl --nproc 4 --set parallel.tensor=3", ("parallel.tensor = 3", "must divide model.num_heads = 4", "choose one of 1, 2")),
    "name too long": ("/" + "x" * 300 + " --data FOLDER/pairs.jsonl", ("the checkpoint /xxx", "cannot be read (File name too long)", "check the path")),
    "output of a long name": ("RUN --data FOLDER/pairs.jsonl --per-pair FOLDER/" + "x" * 300, ("--per-pair FOLDER/xxx", "cannot be written", "name a file")),
    "output is the input": ("RUN --data FOLDER/pairs.jsonl --per-pair FOLDER/pairs.jsonl", ("is the file FOLDER/pairs.jsonl, which is read", "never takes the place of an input", "Name another file")),
    "other data": ("RUN --data FOLDER/pairs.jsonl --set data.train=FOLDER/pairs.jsonl", ("--set data.train=FOLDER/pairs.jsonl", "does not take data.train from --set", "use --data")),
    "another algorithm": ("RUN --data FOLDER/pairs.jsonl --set algo.name=sft", ("--set algo.name=sft", "does not take algo.name from --set", "leave it out")),
    "another tokenizer": ("RUN --data FOLDER/pairs.jsonl --set data.tokenizer=x", ("does not take data.tokenizer from --set", "it is the checkpoint's own", "Its keys are parallel.tensor, ")),
    "another cache": ("RUN --data FOLDER/pairs.jsonl --set data.cache_dir=x", ("does not take data.cache_dir from --set", "it is the checkpoint's own", "leave it out")),
    "another model": ("RUN --data FOLDER/pairs.jsonl --set model.num_layers=3", ("does not take model.num_layers from --set", "it is the checkpoint's own", "leave it out")),
    "unknown user": ("RUN --data ~nobody-of-that-name/pairs.jsonl", ("'~nobody-of-that-name/pairs.jsonl': no such file", "data files must exist", "Check the path")),
    "template of an unknown user": ("RUN --data FOLDER/pairs.jsonl --set data.template=~nobody-of-that-name/t", ("data.template is '~nobody-of-that-name/t'", "must be auto, none", "Correct the name or the path")),
    "key": ("RUN --data FOLDER/pairs.jsonl --set algo.bta=1", ("algo.bta = 1", "unknown key", "did you mean algo.beta?")),
}
GENERATE: dict[str, tuple[str, Says]] = {
    "no checkpoint": ("/nowhere Q", ("/nowhere is not a checkpoint", "no run folder with one", "give a folder like")),
    "empty prompt": ("RUN ''", ("prompt 1 is empty", "a prompt has some text", "Fill it or leave it out")),
    "prompt too long": ("RUN --file FOLDER/long.txt --max-new-tokens 8", ("long.txt:2 has ", "must be at most data.pack_length = 128", "shorten it")),
    "no such file": ("RUN --file FOLDER/absent.txt", ("absent.txt: cannot be read", "prompts are a text file or JSON lines", "Check the path")),
    "empty file": ("RUN --file FOLDER/empty.txt", ("empty.txt: no prompts in it", "one per line", "or JSON lines")),
    "binary file": ("RUN --file FOLDER/binary.txt", ("binary.txt:1: byte 0xff is not UTF-8 text", "prompts are a text file or JSON lines", "Convert the file")),
    "another seed": ("RUN Q --set train.seed=3", ("--set train.seed=3", "does not take train.seed from --set", "use --seed")),
    "another tokenizer": ("RUN Q --set data.tokenizer=x", ("does not take data.tokenizer from --set", "it is the checkpoint's own", "leave it out")),
    "tokens over ranks": ("RUN Q --nproc 2 --set parallel.context=2", ("does not take parallel.context from --set", "use parallel.tensor", "one by one")),
    "a key of training": ("RUN Q --set data.max_length=9", ("does not take data.max_length from --set", "leave it out", "Its keys are parallel.tensor, ")),
    "array": ("RUN --file FOLDER/array.json", ("array.json: a JSON list", "prompts are a text file or JSON lines", "one per line (jq -c '.[]')")),
    "layout of four": ("RUN Q --nproc 4 --set parallel.tensor=3", ("parallel.tensor = 3", "must divide model.num_heads = 4", "choose one of 1, 2")),
    "no tokens": ("RUN Q --max-new-tokens 0", ("max_new_tokens", "must be 1 or more", "0")),
    "negative temperature": ("RUN Q --temperature -1", ("temperature", "must be 0 (greedy) or more", "-1")),
    "no place for the output": ("RUN Q --out /nowhere/out.jsonl", ("--out /nowhere/out.jsonl", "cannot be written", "name a file in a folder that exists")),
    "kernels": ("RUN Q --set train.precision=fp8", ("--set train.precision=fp8", "does not run in FP8, which is for training", 'set it to "bf16"')),
}
# fmt: on


@pytest.fixture(scope="module")
def other_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished weights whose tokenizer gives other ids."""
    from nova_sys.train import main

    made = small_run.SmallRun(tmp_path_factory.mktemp("other")).create()
    made.data.write_text(made.data.read_text().replace("yes", "perhaps").replace("no", "never"))
    main([str(made.recipe), "--set", "train.steps=1"])
    return made.dir


@pytest.mark.parametrize("name", EVALUATE)
def test_evaluate(name: str, trained: Run, refuses: Refuses, other_vocabulary: Path) -> None:
    shutil.copytree(other_vocabulary, trained.folder / "other")
    words, says = EVALUATE[name]
    arguments = shlex.split(words)
    refuses("evaluate", *(trained.at(word) for word in arguments), says=says)


@pytest.mark.parametrize("name", GENERATE)
def test_generate(name: str, trained: Run, refuses: Refuses) -> None:
    trained.write("long.txt", "Q\n" + "Q " * 200)
    trained.write("empty.txt", "")
    trained.write("array.json", '[{"prompt": "Q"}]')
    trained.write("binary.txt", b"\xff\xfe\x00")
    words, says = GENERATE[name]
    refuses("generate", *(trained.at(word) for word in shlex.split(words)), says=says)


@pytest.mark.parametrize("name", ["config.toml", "tokenizer/tokenizer.model"])
def test_a_file_that_a_checkpoint_lacks(name: str, trained: Run, refuses: Refuses) -> None:
    (checkpoint,) = (trained.dir / "checkpoints").iterdir()
    (checkpoint / name).unlink()
    says = (f"{checkpoint} is damaged", f"{name} (", "restore it from a copy")
    refuses("generate", trained.dir, "Q", says=says)
    refuses("evaluate", trained.dir, "--data", trained.data, says=says)


def test_an_output_that_is_an_input_is_refused(trained: Run, refuses: Refuses) -> None:
    """Under whatever name: as it is, through a link, by a detour, or a file of a checkpoint."""
    link, hard = trained.folder / "link", trained.folder / "hard"
    link.symlink_to(trained.data)
    hard.hardlink_to(trained.data)
    (checkpoint,) = (trained.dir / "checkpoints").iterdir()
    before = trained.data.read_bytes()
    detour = trained.dir / ".." / trained.data.name
    for out in (
        trained.data,
        link,
        hard,
        detour,
        checkpoint / "nova.json",
        checkpoint / ".metadata",
    ):
        says = (f"{out}: is the file ", "never takes the place of an input", "Name another file")
        pairs = f"{trained.folder}/*.jsonl"
        refuses("evaluate", trained.dir, "--data", pairs, "--per-pair", out, says=says)
        refuses("generate", trained.dir, "--file", trained.data, "--out", out, says=says)
    assert trained.data.read_bytes() == before and link.is_symlink()


@pytest.mark.parametrize(
    ("seen", "change"),
    [
        ("nova.json is malformed: it names no format", lambda _: [1]),
        ("step: Input should be a valid integer", lambda was: {**was, "step": "1"}),
        ("files.a: Input should be a valid integer", lambda was: {**was, "files": {"a": None}}),
        ("model has no kv_shift", lambda was: {**was, "model": {}}),
        ("nova.json is malformed: 'format'", lambda _: {}),
    ],
)
def test_a_malformed_description(
    seen: str, change: Callable[[Any], Any], trained: Run, refuses: Refuses
) -> None:
    (path,) = (trained.dir / "checkpoints").glob("*/nova.json")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    says = (f"{path.parent} is damaged", seen, "restore it from a copy")
    refuses("generate", trained.dir, "Q", says=says)
    refuses(*trained.train(), says=says)


def test_a_description_that_is_nested_too_deep(trained: Run, refuses: Refuses) -> None:
    (path,) = (trained.dir / "checkpoints").glob("*/nova.json")
    path.write_text("[" * 100_000)
    says = (f"{path.parent} is damaged", "maximum recursion depth", "restore it from a copy")
    refuses("generate", trained.dir, "Q", says=says)
