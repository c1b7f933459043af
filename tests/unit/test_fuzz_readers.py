"""Mutated files for everything that reads a user's file: refused in our own words, or read whole. Never a fault, a hang, a lost record.

    pytest tests/unit/test_fuzz_readers.py                                   a few seconds per reader, the same examples every time
    NOVA_FUZZ_SECONDS=600 pytest -m slow tests/unit/test_fuzz_readers.py     other examples, as long as one likes (default: a minute)

Tokenizers are parsed by native code, which could take the process with it: they are read in a process of their own, `Reader`.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nova_sys.config_io import check, load_recipe
from nova_sys.data.chat import BUILT_IN, ChatTemplate
from nova_sys.data.formats import parse_record, read_objects
from nova_sys.data.records import DialogueRecord, UnusableRecord
from nova_sys.data.store import StoreSpec, build_store
from nova_sys.data.token_store import ARRAYS, TokenStore
from nova_sys.data.tokenizer import Tokenizer, load_tokenizer
from nova_sys.data.tokenizer_training import train_sentencepiece
from nova_sys.errors import is_user_error

spec = importlib.util.spec_from_file_location("mutations", Path(__file__).with_name("mutations.py"))
assert spec is not None and spec.loader is not None
mutations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutations)
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
        self.reader = Reader()


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
    data = data_file(rng)
    path, store = work.folder / "data.jsonl", work.folder / "mutated"
    shutil.rmtree(store, ignore_errors=True)
    path.write_bytes(data)
    with only_our_refusals(path):
        spec = StoreSpec(
            train=str(path),
            tokenizer=work.tokenizer,
            kind=rng.choice(["sft", "pairs"]),
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


def tokenizers_of_hugging_face(rng: random.Random, work: Workplace) -> None:
    files = {}
    for name, value in work.hf.items():
        for _ in range(rng.randrange(3)):
            value = mutate_json(value, rng)
        files[name] = json.dumps(value).encode()
        if rng.random() < 0.2:
            files[name] = mutate_bytes(files[name], rng)
    work.reader.judge(files)


def tokenizers_of_sentencepiece(rng: random.Random, work: Workplace) -> None:
    work.reader.judge({"tokenizer.model": mutated(work.spm, rng)})


TARGETS: dict[Callable[[random.Random, Workplace], None], int] = {
    reader_of_records: 400,
    builder_of_stores: 150,
    templates: 300,
    recipes: 300,
    opener_of_stores: 150,
    reference_caches: 150,
    tokenizers_of_hugging_face: 200,
    tokenizers_of_sentencepiece: 100,
}
"""Examples of the short run, together about 15 s."""


# -- tokenizers, in a process of their own ------------------------------------------------------------------------------

TEXTS = ["", " a  b", "2+2=4\n", "<s>x</s>", "\u2581\U0001f642 \0 e\u0301", "a" * 300]


class Reader:
    """A process that loads tokenizers and uses them; started again when one was too much for it."""

    process: subprocess.Popen[bytes] | None = None

    def judge(self, files: dict[str, bytes]) -> None:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        process = self.process
        assert process.stdin and process.stdout
        timer = signal.signal(signal.SIGALRM, lambda *_: process.kill())
        signal.alarm(LIMIT_S)
        try:
            pickle.dump(files, process.stdin)
            process.stdin.flush()
            verdict = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            verdict = (
                f"the process ended with {process.wait()} (-9: it was stopped after {LIMIT_S} s)"
            )
            self.process = None
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, timer)
        assert verdict in ("read", "refused"), verdict
        outcomes[verdict] += 1

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


def verdict_on(files: dict[str, bytes], folder: Path) -> str:
    """`read` or `refused`, or else what went wrong."""
    for old in folder.iterdir():
        old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    try:
        tokenizer = load_tokenizer(folder)
    except BaseException as error:
        ours = is_user_error(error) and str(folder) in str(error)
        return "refused" if ours else traceback.format_exc()
    try:
        for text in TEXTS:
            for continues in (False, True):
                ids, offsets = tokenizer.encode_with_offsets(text, continues=continues)
                assert all(0 <= i < tokenizer.vocab_size for i in ids), ids
                assert len(ids) == len(offsets) and all(0 <= b <= len(text) for _, b in offsets)
                tokenizer.decode(ids)
    except BaseException as error:
        return "refused" if is_user_error(error) else traceback.format_exc()
    return "read"


def serve() -> None:
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print
    with tempfile.TemporaryDirectory() as folder:
        while True:
            try:
                files = pickle.load(source)
            except EOFError:
                return
            pickle.dump(verdict_on(files, Path(folder)), sink)
            sink.flush()


# -- the tests ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    place = Workplace(tmp_path_factory.mktemp("fuzz"))
    yield place
    place.reader.close()


def fuzz(target: Callable[..., None], work: Workplace, examples: int, seed: int) -> None:
    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        derandomize=False,  # the seed decides
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def check_one(rng: random.Random) -> None:
        target(rng, work)

    check_one()


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


if __name__ == "__main__":
    serve()
