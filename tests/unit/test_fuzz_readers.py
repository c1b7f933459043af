"""Mutated files for everything that reads a user's file: refused in our own words, or read whole. Never a fault, a hang, a lost record.

    pytest tests/unit/test_fuzz_readers.py                                   a few seconds per reader, the same examples every time
    NOVA_FUZZ_SECONDS=600 pytest -m slow tests/unit/test_fuzz_readers.py     other examples, as long as one likes (default: a minute)

Tokenizers are parsed by native code, which could take the process with it: they are read in a process of their own, by tokenizer_reader.py.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import random
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from nova_sys.checkpoint_files import (
    COMMON,
    DESCRIPTION,
    METADATA,
    Description,
    describe_model,
    file_sizes,
    read_description,
    refuse_harmful,
)
from nova_sys.config import ModelConfig, RunConfig
from nova_sys.config_io import check, load_recipe, to_toml
from nova_sys.data.chat import BUILT_IN, ChatTemplate
from nova_sys.data.formats import parse_record, read_objects
from nova_sys.data.prompts import read_prompts
from nova_sys.data.records import DialogueRecord, UnusableRecord
from nova_sys.data.store import StoreSpec, build_store
from nova_sys.data.token_store import ARRAYS, TokenStore
from nova_sys.data.tokenizer import Tokenizer
from nova_sys.data.tokenizer_training import train_sentencepiece
from nova_sys.errors import is_user_error
from nova_sys.hf.folder import HFFolder
from nova_sys.start import RUN_FILE, _left_by


def beside(name: str) -> Any:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mutations, tokenizer_reader = beside("mutations"), beside("tokenizer_reader")
RECORDS, BRACKETS, RECIPE = mutations.RECORDS, mutations.BRACKETS, mutations.RECIPE
data_file, mutated, mutate_bytes = mutations.data_file, mutations.mutated, mutations.mutate_bytes
mutate_json = mutations.mutate_json

LIMIT_S = 30
"""Per example. Most take milliseconds; a busy machine may stall any of them."""

# -- the judge ----------------------------------------------------------------------------------------------------------


outcomes: Counter[str] = Counter()
"""How the examples of the present target ended."""


class TooLong(BaseException):
    """No Exception, which the code under test might take for a failure of a template or a library."""


@contextmanager
def only_our_refusals(*named: object) -> Iterator[None]:
    """Passes a refusal in our own words that names what it is about; fails at every other error, and when there is no end."""

    def too_long(*_: object) -> None:
        raise TooLong(f"still at work after {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT_S)
    try:
        yield
        outcomes["read"] += 1
    except ValueError as error:
        outcomes["refused"] += 1
        assert is_user_error(error), traceback.format_exc()
        assert all(str(name) in str(error) for name in named), (named, str(error))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def num_lines(data: bytes) -> int:
    """Lines that are not blank, counted in another way than the reader does."""
    text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    return sum(bool(line.strip()) for line in text.decode("utf-8-sig").split("\n"))


class Workplace:
    """Seeds that take time to make, and a folder to write in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        texts = [json.dumps(record) for record in RECORDS] * 4
        self.tokenizer: Tokenizer = train_sentencepiece(texts, 350, folder / "seed.model")
        self.spm = (folder / "seed.model").read_bytes()
        self.hf = mutations.hugging_face_files(texts)
        data = folder / "seed.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:4]))
        self.store = folder / "store"
        spec = StoreSpec(train=str(data), tokenizer=self.tokenizer, kind="pairs", pack_length=128)
        build_store(spec, self.store)
        self.store_files = {path.name: path.read_bytes() for path in self.store.iterdir()}
        opened = TokenStore.open(self.store)
        self.arrays = {name: np.array(getattr(opened, name)) for name in ARRAYS}
        self.checkpoint = checkpoint_in(folder / "run" / "checkpoints" / "step_1")
        self.model = folder / "model"
        self.model_files = mutations.hugging_face_model(self.model)
        self.reader = tokenizer_reader.Reader()


def checkpoint_in(folder: Path) -> Path:
    """With the small files of a real one."""
    torch.distributed.checkpoint.save(
        {"w": torch.ones(3)}, storage_writer=FileSystemWriter(folder), no_dist=True
    )
    torch.save({"step": 1}, folder / COMMON)
    (folder / "config.toml").write_text(to_toml(RunConfig()))
    what = {"model": describe_model(ModelConfig()), "vocab_size": 350, "run": {"algo": {}}}
    names = {"data_key": "d", "start_identity": "s", "identity": "i", "device": "cpu"}
    description = Description(**what, **names, step=1, world_size=1, files=file_sizes(folder))
    (folder / DESCRIPTION).write_text(json.dumps(asdict(description)))
    return folder


# -- what must hold -----------------------------------------------------------------------------------------------------


def reader_of_records(rng: random.Random, work: Workplace) -> None:
    """Every line that is not blank is a record, is unusable for a reason, or ends the reading with its place."""
    data, kind = data_file(rng), rng.choice(["sft", "pairs"])
    path = work.folder / "data.jsonl"
    path.write_bytes(data)
    with only_our_refusals(path):
        found = 0
        for source, value in read_objects(path):
            try:
                parse_record(value, source, kind)
            except UnusableRecord as problem:
                assert problem.reason and str(source) in str(problem)
            found += 1
        assert found == num_lines(data)


def builder_of_stores(rng: random.Random, work: Workplace) -> None:
    """Every record is a document or counted as skipped; what is stored are the tokenizer's ids, of the lines that it says."""
    kind = rng.choice(["sft", "pairs"])
    data = data_file(rng, rng.choice(["", kind, kind, kind]))
    path, store = work.folder / "data.jsonl", work.folder / "mutated"
    shutil.rmtree(store, ignore_errors=True)
    path.write_bytes(data)
    with only_our_refusals(path):
        spec = StoreSpec(
            train=str(path),
            tokenizer=work.tokenizer,
            kind=kind,
            pack_length=rng.choice([16, 64, 512]),
            template=rng.choice(["auto", *BUILT_IN]),
            share_prefix=rng.random() < 0.8,
        )
        report = build_store(spec, store)
        opened = TokenStore.open(store)
        assert report.num_records == num_lines(data)
        assert report.num_documents + sum(report.skipped.values()) == report.num_records
        assert opened.num_documents == report.num_documents == len(set(opened.source[:, 1]))
        assert ((opened.tokens >= 0) & (opened.tokens < work.tokenizer.vocab_size)).all()


def templates(rng: random.Random, work: Workplace) -> None:
    text = rng.choice([*BUILT_IN.values(), BRACKETS])
    text = mutated(text.encode(), rng, most=2).decode("utf-8", "replace")
    with only_our_refusals("template"):
        template = ChatTemplate(text, name="t", special_texts={"eos_token": "</s>"})
        record = parse_record(RECORDS[4], None, "sft")  # type: ignore[arg-type]
        assert isinstance(record, DialogueRecord)
        rendered, loss = template.render_with_spans(record.messages, tools=record.tools)
        edges = [edge for span in loss for edge in span]
        assert edges == sorted(edges) and all(0 <= edge <= len(rendered) for edge in edges)
        assert "\ufdd0" not in rendered.replace("\ufdd0", "", text.count("\ufdd0"))


def recipes(rng: random.Random, work: Workplace) -> None:
    path = work.folder / "recipe.toml"
    path.write_bytes(mutated(RECIPE.encode(), rng))
    overrides = [mutated(b"train.steps=[1, 2]", rng).decode("utf-8", "surrogateescape")]
    with only_our_refusals(path):
        load_recipe(path)
    with only_our_refusals():
        check(load_recipe(path, overrides if rng.random() < 0.5 else ()), 1)


def opener_of_stores(rng: random.Random, work: Workplace) -> None:
    """A damaged store is refused, or it was not damaged where it matters."""
    name = rng.choice(sorted(work.store_files))
    original = work.store_files[name]
    harmed = mutated(original, rng, most=1)
    if name == "meta.json" and rng.random() < 0.5:
        harmed = json.dumps(mutate_json(json.loads(original), rng)).encode()
    (work.store / name).write_bytes(harmed)
    try:
        with only_our_refusals(work.store):
            opened = TokenStore.open(work.store)
            for array, values in work.arrays.items():
                assert np.array_equal(getattr(opened, array), values), array
            assert opened.source_of(0).endswith("seed.jsonl:1")
    finally:
        (work.store / name).write_bytes(original)


def reference_caches(rng: random.Random, work: Workplace) -> None:
    """A damaged cache is not used, or it was not damaged where it matters."""
    from nova_sys.reference import _read_logps, _write_logps

    path, logp = work.folder / "reference-0.npz", np.arange(40.0)
    _write_logps(path, logp)
    path.write_bytes(mutated(path.read_bytes(), rng, most=1))
    with only_our_refusals(path):
        found = _read_logps(path, 40)
        assert found is None or np.array_equal(found, logp)
    if found is None:
        outcomes.update({"read": -1, "refused": 1})


def prompt_files(rng: random.Random, work: Workplace) -> None:
    """Every line that is not blank is a prompt."""
    path = work.folder / "prompts"
    text = b"[INST] what is 2+2? [/INST]\r\n\n Q:\tone \n" * 3
    path.write_bytes(data := data_file(rng) if rng.random() < 0.7 else mutated(text, rng))
    with only_our_refusals(path):
        assert len(read_prompts(path)) == num_lines(data)


def checkpoints(rng: random.Random, work: Workplace) -> None:
    """What a checkpoint's small files say is understood, or refused by its name; unpickling is for plain classes."""
    readers = {
        DESCRIPTION: lambda path: read_description(path.parent).step,
        METADATA: lambda path: refuse_harmful(path.parent),
        COMMON: lambda path: refuse_harmful(path.parent),
        "config.toml": load_recipe,
    }
    path = work.checkpoint / rng.choice(sorted(readers))
    original = path.read_bytes()
    harmed = mutated(original, rng, most=1)
    if path.name == DESCRIPTION and rng.random() < 0.7:
        harmed = json.dumps(mutate_json(json.loads(original), rng)).encode()
    path.write_bytes(harmed)
    try:
        with only_our_refusals(work.checkpoint):
            readers[path.name](path)
    finally:
        path.write_bytes(original)


def run_files(rng: random.Random, work: Workplace) -> None:
    value = mutate_json({"train.seed": 1, "algo": {"beta": 0.1}}, rng)
    data = json.dumps(value).encode()
    (work.folder / RUN_FILE).write_bytes(data if rng.random() < 0.5 else mutated(data, rng))
    with only_our_refusals(work.folder):
        assert isinstance(_left_by(work.folder), dict)


def tokenizers_of_hugging_face(rng: random.Random, work: Workplace) -> None:
    files = {}
    for name, value in work.hf.items():
        for _ in range(rng.randrange(3)):
            value = mutate_json(value, rng)
        files[name] = json.dumps(value).encode()
        if rng.random() < 0.2:
            files[name] = mutate_bytes(files[name], rng)
    outcomes[work.reader.judge(files)] += 1


def tokenizers_of_sentencepiece(rng: random.Random, work: Workplace) -> None:
    model = mutated(work.spm, rng) if rng.random() < 0.9 else work.spm  # few survive a harm
    outcomes[work.reader.judge({"tokenizer.model": model})] += 1


def models_of_hugging_face(rng: random.Random, work: Workplace) -> None:
    """A damaged folder is refused, or gives every tensor in the shape that its config.json says."""
    name = rng.choice([*work.model_files, "config.json", "config.json"])
    original = work.model_files[name]
    harmed = mutated(original, rng, most=1)
    if name.endswith(".json") and rng.random() < 0.7:
        harmed = json.dumps(mutate_json(json.loads(original), rng)).encode()
    (work.model / name).write_bytes(harmed)
    try:
        with only_our_refusals(work.model):
            found = HFFolder(work.model)
            for tensor, shape in found.expected().items():
                assert found.slice(tensor, slice(None)).shape == shape
    finally:
        (work.model / name).write_bytes(original)


TARGETS: dict[Callable[[random.Random, Workplace], None], int] = {
    reader_of_records: 400,
    builder_of_stores: 150,
    templates: 300,
    recipes: 300,
    opener_of_stores: 150,
    reference_caches: 150,
    prompt_files: 300,
    checkpoints: 300,
    run_files: 100,
    models_of_hugging_face: 600,
    tokenizers_of_hugging_face: 200,
    tokenizers_of_sentencepiece: 100,
}
"""Examples of the short run, together about 15 s."""


# -- the tests ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    place = Workplace(tmp_path_factory.mktemp("fuzz"))
    yield place
    place.reader.close()


def fuzz(target: Callable[..., None], work: Workplace, examples: int, seed: int) -> None:
    """Not drawn by hypothesis, whose draws depend on the modules that happen to be imported."""
    for example in range(examples):
        name = f"{seed}-{example}"
        print(
            f'{target.__name__}(random.Random("{name}"), work)'
        )  # the last line says how to repeat a failure
        target(random.Random(name), work)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_mutated_files(target: Callable[..., None], work: Workplace) -> None:
    outcomes.clear()
    fuzz(target, work, TARGETS[target], seed=0)
    assert min(outcomes["read"], outcomes["refused"]) > TARGETS[target] // 50, outcomes


def test_the_judge_condemns() -> None:
    """A fault, a refusal that does not say of what, a foreign ValueError, no end: none of them passes."""
    with pytest.raises(KeyError), only_our_refusals():
        raise KeyError("a fault")
    with pytest.raises(AssertionError, match=r"ours\.txt"), only_our_refusals("ours.txt"):
        parse_record(3, "theirs.txt", "sft")  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="Traceback"), only_our_refusals():
        json.loads("x")
    ours = {"__name__": "nova_sys.some_module", "np": np}
    for fault in ("np.zeros(2) + np.zeros(3)", "int('x')", "list(zip([1], [], strict=True))"):
        with pytest.raises(AssertionError, match="Traceback"), only_our_refusals():
            exec(fault, ours)
    with only_our_refusals("in our words"):
        exec("try:\n  int('x')\nexcept ValueError:\n  raise ValueError('in our words')", ours)
    with pytest.raises(TooLong), only_our_refusals():
        signal.raise_signal(signal.SIGALRM)


def test_a_process_that_dies_is_noticed(work: Workplace) -> None:
    work.reader.judge({"tokenizer.model": work.spm})
    assert work.reader.process is not None
    work.reader.process.kill()
    work.reader.process.wait()
    with pytest.raises(AssertionError, match="the process ended with -9"):
        work.reader.judge({"tokenizer.model": work.spm})
    work.reader.judge({"tokenizer.model": work.spm})  # a new one


@pytest.mark.slow
def test_mutated_files_for_a_minute(work: Workplace) -> None:
    end = time.monotonic() + float(os.environ.get("NOVA_FUZZ_SECONDS", "60"))
    first = seed = time.time_ns() % 2**32
    while time.monotonic() < end:
        for target in TARGETS:
            seed += 1
            fuzz(target, work, max(10, TARGETS[target] // 10), seed)
    print(f"seeds {first + 1} to {seed}")
