"""A store under construction: whatever ends the build, the next one goes on and makes the same store."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nova_sys.data import building, lines, progress, workers
from nova_sys.data.store import StoreSpec, build_store
from nova_sys.data.token_store import StoreReport, TokenStore
from nova_sys.data.tokenizer import Tokenizer
from nova_sys.data.tokenizer_training import train_sentencepiece

WEEK_S = 7 * 24 * 3600


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("spm") / "t.model"
    return train_sentencepiece(["the quick brown fox 0123456789"] * 3, 320, path)


def write_pairs(path: Path, count: int) -> None:
    """Every fifth record cannot be used, every seventh is too long."""
    rows = (
        {
            "prompt": f"the {i}",
            "chosen": "fox " * (i % 5) + "brown " * 40 * (i % 7 == 1),
            "rejected": "quick",
        }
        for i in range(count)
    )
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def spec(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreSpec:
    """Two files, with a few records per block."""
    monkeypatch.setattr(lines, "BLOCK_BYTES", 700)
    write_pairs(tmp_path / "a.jsonl", 20)
    write_pairs(tmp_path / "b.jsonl", 12)
    return StoreSpec(str(tmp_path / "?.jsonl"), tokenizer, "pairs", 64)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    """What lies in a folder, but for data files."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".jsonl")


def watch(monkeypatch: pytest.MonkeyPatch, before: Callable[[lines.Block], None]) -> None:
    """`before` sees each block that is tokenised."""

    def documents_of(block: lines.Block, rules: Any) -> Any:
        before(block)
        return real(block, rules)

    real = workers.documents_of
    monkeypatch.setattr(workers, "documents_of", documents_of)


def test_a_build_that_dies_at_any_write_goes_on(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write in turn is the last one, and only half of it is done."""
    build_store(spec, tmp_path / "expected")
    writes, last = 0, 0

    def append(writer: building.ArrayWriter, rows: np.ndarray) -> None:
        count(lambda: writer._stream.write(rows.tobytes()[: rows.nbytes // 2]))
        real_append(writer, rows)

    def write(progress: building.Progress, folder: Path) -> None:
        count(lambda: (folder / "progress.json.partial").write_text("{"))
        real_write(progress, folder)

    def count(half: Callable[[], Any]) -> None:
        nonlocal writes
        writes += 1
        if writes == last:
            half()
            raise Killed

    real_append, real_write = building.ArrayWriter.append, building.Progress.write
    monkeypatch.setattr(building.ArrayWriter, "append", append)
    monkeypatch.setattr(building.Progress, "write", write)
    while True:
        writes, last = 0, last + 1
        folder = tmp_path / f"store{last}"
        try:
            build_store(spec, folder)
            break
        except Killed:
            writes = -(10**6)  # now let it finish
            build_store(spec, folder)
            assert content(folder) == content(tmp_path / "expected"), last
    assert last > 25
    assert not any("building" in name or "lock" in name for name in names(tmp_path))


def interrupt(spec: StoreSpec, folder: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Leaves a build of so many blocks."""

    def append(growing: building.GrowingStore, block: Any, documents: Any) -> None:
        nonlocal after
        appended(growing, block, documents)
        after -= 1
        if after == 0:
            raise Killed

    appended = building.GrowingStore.append
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(building.GrowingStore, "append", append)
        build_store(spec, folder)


@pytest.mark.parametrize("damage", ["bit", "short", "progress"])
def test_what_was_damaged_meanwhile_is_not_continued(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, caplog: Any
) -> None:
    interrupt(spec, tmp_path / "store", monkeypatch, after=3)
    path = tmp_path / "store.building" / "tokens.npy"
    data = bytearray(path.read_bytes())
    data[300] ^= 4
    if damage == "bit":
        path.write_bytes(data)
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-4])
    else:
        (tmp_path / "store.building" / "progress.json").write_text("[]")
    build_store(spec, tmp_path / "store")
    assert "cannot be continued" in caplog.text
    build_store(spec, tmp_path / "whole")
    assert content(tmp_path / "store") == content(tmp_path / "whole")


def test_what_is_done_is_not_done_again(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(spec, tmp_path / "store", monkeypatch, after=3)
    done: list[tuple[int, int]] = []
    watch(monkeypatch, lambda block: done.append((block.file, block.first_line)))
    build_store(spec, tmp_path / "whole")
    all_blocks, done[:] = list(done), []
    build_store(spec, tmp_path / "store")
    assert done == all_blocks[3:] and len(done) == 2


def test_what_killed_builds_of_other_data_left_is_removed_after_a_week(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("old", "new"):
        interrupt(spec, tmp_path / name, monkeypatch, after=2)
    then = time.time() - WEEK_S - 60
    os.utime(tmp_path / "old.building", (then, then))
    build_store(spec, tmp_path / "store")
    assert names(tmp_path) == ["new.building", "store"]


def test_without_locks_a_build_has_a_folder_of_its_own(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def flock(stream: Any, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(building.fcntl, "flock", flock)
    assert build_store(spec, tmp_path / "store").num_documents == 26
    assert TokenStore.open(tmp_path / "store").num_documents == 26
    assert "no locks" in caplog.text
    assert [name for name in names(tmp_path) if "building" in name] == []


def test_a_file_that_changes_while_it_is_read(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch, lambda block: os.utime(tmp_path / "a.jsonl", (1, 1)))
    with pytest.raises(ValueError, match="changed while it was read"):
        build_store(spec, tmp_path / "store")
    assert names(tmp_path) == []


def test_a_full_disk_names_the_file_and_keeps_what_is_done(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    writer = building.ArrayWriter(tmp_path / "tokens.npy", "tokens")
    writer.close()
    writer._stream = Full()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(OSError, match=r"No space left on device: '.*tokens.npy'"):
        writer.append(np.zeros(3, np.int32))


# What is seen meanwhile


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(monkeypatch: pytest.MonkeyPatch, with_bar: bool) -> None:
    """A minute of 60 MB: a million tokens per second."""
    seconds = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds)
    with progress.Meter(60_000_000, with_bar=with_bar) as meter:
        for second in range(61):
            seconds = float(second)
            report = StoreReport(num_records=1000 * second, num_tokens=10**6 * second)
            meter.show(10**6 * second, report)


def test_a_line_per_tenth(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    caplog.set_level("INFO")
    show(monkeypatch, with_bar=True)  # standard error is no terminal here
    assert len(caplog.messages) == 10
    expected = "data: 50% tokenised, 1,000 records/s, 1,000,000 tokens/s, 0:30 left"
    assert caplog.messages[4] == expected
    caplog.clear()
    monkeypatch.setattr(sys, "stderr", Screen())
    show(monkeypatch, with_bar=False)
    assert len(caplog.messages) == 10


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    caplog.set_level("INFO")
    show(monkeypatch, with_bar=True)
    assert caplog.messages == []
    assert "1,000,000 tokens/s" in screen.getvalue() and "100%" in screen.getvalue()


def test_small_data_shows_nothing(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    caplog.set_level("INFO")
    with progress.Meter(100, with_bar=True) as meter:
        meter.show(100, StoreReport(num_records=3))
    assert caplog.messages == [] and screen.getvalue() == ""
