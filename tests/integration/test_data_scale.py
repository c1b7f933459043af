"""Tokenising at scale: the same store for any number of processes, after any interruption, in bounded memory."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from nova_sys.data import building, lines, store, workers
from nova_sys.data.store import StoreSpec, build_store
from nova_sys.data.token_store import TokenStore
from nova_sys.data.tokenizer import Tokenizer, load_tokenizer
from nova_sys.data.tokenizer_training import train_sentencepiece

PATIENCE_S = 120.0
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dogs",
    "sleep",
    "é",
    "你好",
    "42",
]


def pairs(count: int, seed: int = 0) -> Iterator[str]:
    """Lines with the usual faults of real data among them: blank lines, equal and empty answers, and long answers."""
    rng = random.Random(seed)
    for i in range(count):
        prompt, chosen, rejected = (
            " ".join(rng.choices(WORDS, k=rng.randint(2, 8))) for _ in range(3)
        )
        if i % 50 == 7:
            rejected = chosen
        if i % 50 == 11:
            chosen = ""
        if i % 50 == 23:
            chosen = " ".join(rng.choices(WORDS, k=99))
        yield json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n"
        if i % 50 == 31:
            yield "\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("spm") / "t.model"
    return train_sentencepiece([" ".join(WORDS)] * 3, 320, path)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few records per block, so that small data takes the ways of large data."""
    monkeypatch.setattr(lines, "BLOCK_BYTES", 1500)
    monkeypatch.setattr(workers, "BLOCKS_ALONE", 1)


@pytest.fixture
def spec(tokenizer: Tokenizer, tmp_path: Path) -> StoreSpec:
    """Three files, plain and gzip."""
    (tmp_path / "a.jsonl").write_text("".join(pairs(150, 1)))
    (tmp_path / "b.jsonl").write_bytes(gzip.compress("".join(pairs(100, 2)).encode()))
    (tmp_path / "c.jsonl").write_text("".join(pairs(40, 3)).rstrip())
    return StoreSpec(str(tmp_path / "?.jsonl"), tokenizer, "pairs", 256)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    """What lies in a folder, but for data files."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".jsonl")


# Any number of processes


def test_the_same_store_for_any_number_of_processes_and_any_blocks(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = build_store(spec, tmp_path / "whole")  # every file is one block
    assert report.num_records == 290 and report.num_documents == 278
    assert report.skipped == {"identical_answers": 6, "empty_answer": 6}
    assert 0 < report.truncated["documents"] <= 6
    assert report.first_seen["empty_answer"] == f"{tmp_path}/a.jsonl:12"
    monkeypatch.setattr(lines, "BLOCK_BYTES", 1500)
    monkeypatch.setattr(workers, "BLOCKS_ALONE", 1)
    for number in (1, 2, 3):
        folder = tmp_path / f"by{number}"
        assert build_store(spec, folder, num_workers=number) == report
        assert content(folder) == content(tmp_path / "whole")
    assert names(tmp_path) == ["by1", "by2", "by3", "whole"]


def test_small_data_starts_no_process(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers._Pool, "_start", None)
    assert build_store(spec, tmp_path / "store", num_workers=8).num_documents == 278


def test_a_process_that_tokenises_imports_little() -> None:
    heavy = "{'torch', 'megatron', 'pydantic', 'rich', 'nova_kernels'}"
    code = f"import sys; from nova_sys.data.workers import main; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("a.jsonl", 140, "not valid JSON"),
        ("b.jsonl", 60, 'a "messages" record'),
        ("c.jsonl", 39, "must be a string or a list of turns"),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_the_first_mistake_in_input_order_is_told(
    spec: StoreSpec, tmp_path: Path, name: str, line: int, message: str
) -> None:
    """A later file is damaged, too; and whoever reads ahead sees it first."""
    bad = {"a.jsonl": '{"prompt"', "b.jsonl": '{"messages": []}'}.get(
        name, '{"prompt": 1, "chosen": "a", "rejected": "b"}'
    )
    path = tmp_path / name
    packed = path.read_bytes()[:2] == b"\x1f\x8b"
    text = (gzip.decompress(path.read_bytes()) if packed else path.read_bytes()).decode()
    rows = text.split("\n")
    rows[line - 1] = bad
    text = "\n".join(rows)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    (tmp_path / "d.jsonl").write_bytes(gzip.compress("".join(pairs(50)).encode())[:-30])
    messages = []
    for number in (1, 2):
        with pytest.raises(ValueError, match=rf"{name}:{line}: .*{message}") as caught:
            build_store(replace(spec), tmp_path / "store", num_workers=number)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert names(tmp_path) == []


@pytest.mark.usefixtures("small_blocks")
def test_a_file_without_usable_records_is_refused_wherever_it_stands(
    spec: StoreSpec, tmp_path: Path
) -> None:
    same = json.dumps({"prompt": "p", "chosen": "a", "rejected": "a"}) + "\n"
    (tmp_path / "bb.jsonl").write_text(same * 100)
    spec = replace(spec, train=[str(tmp_path / f"{n}.jsonl") for n in ("a", "bb", "c")])
    for number in (1, 2):
        with pytest.raises(ValueError, match=r"no usable record in .*bb.jsonl. The first: .*:1: "):
            build_store(replace(spec), tmp_path / "store", num_workers=number)
    (tmp_path / "bb.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"bb.jsonl: no records in it"):
        build_store(replace(spec), tmp_path / "store")


@pytest.mark.usefixtures("small_blocks")
def test_a_killed_process_is_told_and_its_work_done_later(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_store(spec, tmp_path / "expected")
    started: list[subprocess.Popen[bytes]] = []

    def popen(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(real(*arguments, **options))
        return started[-1]

    def append(growing: building.GrowingStore, block: Any, documents: Any) -> None:
        appended(growing, block, documents)
        if len(started) == 2:
            started[-1].kill()

    real, appended = subprocess.Popen, building.GrowingStore.append
    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(building.GrowingStore, "append", append)
    with pytest.raises(RuntimeError, match=r"ended by signal 9; is the machine out of memory\?"):
        build_store(spec, tmp_path / "store", num_workers=2)
    assert all(process.poll() is not None for process in started)  # the other one, too
    assert names(tmp_path) == ["expected", "store.building"]
    build_store(spec, tmp_path / "store")
    assert content(tmp_path / "store") == content(tmp_path / "expected")


# Interruptions


BUILD = """
import sys
from nova_sys.data import lines, workers
from nova_sys.data.store import StoreSpec, build_store
from nova_sys.data.tokenizer import load_tokenizer
data, model, folder, num_workers, lines.BLOCK_BYTES, workers.BLOCKS_ALONE = eval(sys.argv[1])
build_store(StoreSpec(data, load_tokenizer(model), "pairs", 256), folder, num_workers=num_workers)
"""


def start(data: Path, model: Path, folder: Path, num_workers: int, block_bytes: int) -> Any:
    given = (str(data), str(model), str(folder), num_workers, block_bytes, 1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", BUILD, repr(given)], env=environment)


@pytest.fixture
def files(tokenizer: Tokenizer, tmp_path: Path) -> tuple[Path, Path]:
    """Data and tokenizer of a build in a process of its own."""
    data, folder = tmp_path / "data.jsonl", tmp_path / "tokenizer"
    data.write_text("".join(pairs(4000)))
    tokenizer.save(folder)
    return data, folder


def wait_until(condition: Callable[[], Any]) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < PATIENCE_S
        time.sleep(0.002)


def test_a_build_that_is_killed_again_and_again(tmp_path: Path, files: tuple[Path, Path]) -> None:
    build_store(
        StoreSpec(str(files[0]), load_tokenizer(files[1]), "pairs", 256), tmp_path / "whole"
    )
    rng = random.Random()  # another moment each time
    growing, folder = tmp_path / "store.building", tmp_path / "store"

    def records() -> int:
        path = growing / "progress.json"
        return json.loads(path.read_text())["report"]["num_records"] if path.exists() else 0

    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        target = records() + rng.randint(200, 900)
        process = start(*files, folder, num_workers=2, block_bytes=2500)
        wait_until(lambda target=target, p=process: records() >= target or p.poll() is not None)
        time.sleep(rng.random() * 0.01)
        children = psutil.Process(process.pid).children()
        assert process.poll() is None and len(children) == 2
        process.send_signal(number)
        process.wait()
        gone, alive = psutil.wait_procs(children, timeout=PATIENCE_S)
        assert len(gone) == 2 and not alive
        assert not folder.exists()
    assert start(*files, folder, num_workers=1, block_bytes=2500).wait() == 0
    assert content(folder) == content(tmp_path / "whole")
    assert names(tmp_path) == ["store", "tokenizer", "whole"]


def test_two_builders_at_once(tmp_path: Path, files: tuple[Path, Path]) -> None:
    processes = [start(*files, tmp_path / "store", 1, 5000) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    build_store(
        StoreSpec(str(files[0]), load_tokenizer(files[1]), "pairs", 256), tmp_path / "whole"
    )
    assert content(tmp_path / "store") == content(tmp_path / "whole")
    assert names(tmp_path) == ["store", "tokenizer", "whole"]


# Records that cannot be used


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_too_many_unusable_records(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    message = (
        r"^12 of 290 records \(4\.1%\) cannot be used, and data\.max_skipped allows 4\.0%\. skipped: 6 empty_answer "
        r"\(first: \S+a\.jsonl:12\), 6 identical_answers \(first: \S+a\.jsonl:8\)\. Correct the data, or raise data\.max_skipped"
    )
    folder = tmp_path / "store"
    for _ in range(2):  # saying it again costs nothing: it is not published, but kept
        with pytest.raises(ValueError, match=message):
            build_store(spec, folder, num_workers=num_workers, max_skipped=0.04)
        assert names(tmp_path) == ["store.building"]
        monkeypatch.setattr(workers, "documents_of", None)
    report = build_store(spec, folder, max_skipped=0.042)
    assert sum(report.skipped.values()) == 12
    with pytest.raises(ValueError, match=message):  # also of a store that is there
        build_store(spec, folder, max_skipped=0.04)
    assert build_store(spec, folder, max_skipped=0.05) == report


def test_the_limit_is_wired_and_changes_no_key(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nova_sys.config import DataConfig, RunConfig, RunSection
    from nova_sys.data.prepare import prepare_data

    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "data.jsonl").write_text("".join(pairs(100)))
    data = DataConfig(
        train=str(tmp_path / "data.jsonl"),
        tokenizer=str(tmp_path / "tokenizer"),
        pack_length=64,
        max_skipped=0.03,
    )
    config = RunConfig(run=RunSection(dir=str(tmp_path / "run")), data=data)
    with pytest.raises(ValueError, match=r"4 of 100 records \(4\.0%\)"):
        prepare_data(config)
    loose = prepare_data(replace(config, data=replace(data, max_skipped=0.04))).store
    with pytest.raises(ValueError, match=r"4 of 100 records \(4\.0%\)"):
        prepare_data(config)
    monkeypatch.setattr(store, "_build", None)
    again = prepare_data(replace(config, data=replace(data, max_skipped=1.0, workers=3))).store
    assert again.folder == loose.folder


# Memory


class Watch:
    """Largest private memory of this process and of each of its children, in MB above what it began with."""

    def __enter__(self) -> Watch:
        self.ours_mb, self.children_mb = 0.0, 0.0
        self._began, self._over = self._private_mb(os.getpid()), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.02):
            self.ours_mb = max(self.ours_mb, self._private_mb(os.getpid()) - self._began)
            for child in psutil.Process().children():
                self.children_mb = max(self.children_mb, self._private_mb(child.pid))

    @staticmethod
    def _private_mb(pid: int) -> float:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return 0.0
        kib = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
        return int(kib[0]) / 1024 if kib else 0.0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A million documents: their tokens alone are 200 MB."""
    from nova_sys.data.loader import PackLoader

    million, some = 1_000_000, list(pairs(20_000))
    with (tmp_path / "data.jsonl").open("w") as stream:
        for i in range(million // len(some)):
            stream.writelines(some[i:] + some[:i])
    spec = StoreSpec(str(tmp_path / "data.jsonl"), tokenizer, "pairs", 256)
    with Watch() as building_it:
        build_store(spec, tmp_path / "store", num_workers=2)
    opened = TokenStore.open(tmp_path / "store", verify=False)
    assert opened.num_documents > 0.9 * million
    assert opened.tokens.nbytes > 150e6
    assert building_it.ours_mb < 120 and 20 < building_it.children_mb < 200
    with Watch() as loading:
        loader = PackLoader(
            opened, pack_length=256, global_batch_packs=8, data_rank=0, data_size=2, seed=0,
            share_prefix=True,
        )  # fmt: skip
        loader.start(0)
        for _ in range(20):
            loader.next()
        loader.stop()
    bytes_per_document = loading.ours_mb * 2**20 / million
    assert bytes_per_document < 80  # two plans (8), making one (20), and what malloc keeps
