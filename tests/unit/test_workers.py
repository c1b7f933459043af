"""Processes that tokenise: how many, what they import, and what is said of one that stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from multiprocessing.connection import Pipe
from pathlib import Path

import pytest

from nova_sys.data import lines, workers
from nova_sys.data.store import StoreSpec, build_store
from nova_sys.data.tokenizer import Tokenizer
from nova_sys.data.tokenizer_training import train_sentencepiece


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("spm") / "t.model"
    return train_sentencepiece(["the quick brown fox 0123456789"] * 3, 320, path)


@pytest.fixture
def spec(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreSpec:
    monkeypatch.setattr(lines, "BLOCK_BYTES", 700)
    monkeypatch.setattr(workers, "BLOCKS_ALONE", 1)
    rows = ({"prompt": f"the {i}", "chosen": "fox", "rejected": "quick"} for i in range(300))
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return StoreSpec(str(tmp_path / "data.jsonl"), tokenizer, "pairs", 64)


def test_a_process_that_stops_is_told(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lives, and neither answers nor ends."""
    stopped: list[subprocess.Popen[bytes]] = []

    def hand_out(pool: workers._Pool, job: workers._Job) -> bool:
        done = real(pool, job)
        if done and not stopped:
            stopped.append(next(w.process for w in pool._workers if w.job is job))
            stopped[0].send_signal(signal.SIGSTOP)
        return done

    real = workers._Pool._hand_out
    with monkeypatch.context() as patch, pytest.raises(RuntimeError) as caught:
        patch.setattr(workers._Pool, "_hand_out", hand_out)
        patch.setattr(workers, "PATIENCE_S", 3.0)
        build_store(spec, tmp_path / "store", num_workers=2)
    what = f"process {stopped[0].pid}, which tokenises, does not answer at {tmp_path}/data.jsonl:"
    assert str(caught.value).startswith(what)
    assert stopped[0].poll() is not None
    assert build_store(spec, tmp_path / "store", num_workers=2).num_documents == 300


def test_neither_side_of_a_message_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE_S", 0.2)
    ours, theirs = Pipe()
    workers._limit_waiting(ours)
    with pytest.raises(BlockingIOError):
        ours.send(bytes(10_000_000))  # nobody reads
    ours, theirs = Pipe()
    workers._limit_waiting(ours)
    os.write(theirs.fileno(), (1000).to_bytes(4, "big") + b"only the first bytes")
    with pytest.raises(BlockingIOError):
        ours.recv()


def test_one_that_hangs_up_without_ending_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_END_S", 0.1)
    with subprocess.Popen(["sleep", "60"]) as process:
        worker = workers._Worker(process, Pipe()[0])
        with pytest.raises(RuntimeError, match=f"process {process.pid}, .* does not answer"):
            workers._Pool(None, 1)._tell_death(worker)  # pyright: ignore[reportArgumentType]
        process.kill()


def test_the_current_folder_is_not_searched_for_modules(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numpy", "json", "sentencepiece", "nova_sys"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this is the user\\'s own file')")
    monkeypatch.chdir(tmp_path)
    assert build_store(spec, tmp_path / "store", num_workers=2).num_documents == 300


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/", {}, 64),
        ("0::/", {"cpu.max": "max 100000"}, 64),
        ("0::/", {"cpu.max": "250000 100000"}, 3),
        ("0::/", {"cpu.max": "9900000 100000"}, 64),
        ("0::/a/b", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "800000 100000"}, 4),
        ("0::/a/b", {"a/b/cpu.max": "5000 100000"}, 1),
        ("4:memory:/\n1:cpu,cpuacct:/a\n0::/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ("1:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "200000", "cpu/a/cpu.cfs_period_us": "100000"}, 2),
    ],
)  # fmt: skip
def test_no_more_processes_than_a_quota_gives_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], cores: int
) -> None:
    (tmp_path / "own").write_text(own + "\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(workers, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(workers, "_CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert workers.available_cores() == cores
