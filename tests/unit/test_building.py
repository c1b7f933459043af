"""A store under construction: whatever ends the build, the next one goes on and makes the same store."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nova_sys.data import building, lines, workers
from nova_sys.data.disk import FullDisk
from nova_sys.data.store import StoreSpec, build_store
from nova_sys.data.token_store import TokenStore
from nova_sys.data.tokenizer import Tokenizer
from nova_sys.data.tokenizer_training import train_sentencepiece
from nova_sys.errors import is_user_error

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
    """Each write in turn is the last one, and only half of it is done; renaming and the removal of the last note are writes, too."""
    build_store(spec, tmp_path / "expected")
    writes, last, kinds = 0, 0, []

    def dying(kind: str, real: Any, half: Callable[..., Any]) -> Any:
        def write(*arguments: Any, **options: Any) -> Any:
            nonlocal writes
            writes += 1
            if writes == last:
                kinds.append(kind)
                half(*arguments)
                raise Killed
            return real(*arguments, **options)

        return write

    def half_of_rows(writer: building.ArrayWriter, rows: np.ndarray) -> None:
        writer._stream.write(rows.tobytes()[: rows.nbytes // 2])

    def half_of_header(writer: building.ArrayWriter) -> None:
        writer._stream.seek(0)
        writer._stream.write(b"\x93NUMPY")

    def half_of_text(path: Path, text: str) -> None:
        path.with_name(f"{path.name}.partial").write_text(text[: len(text) // 2])

    for owner, name, half in (
        (building.ArrayWriter, "append", half_of_rows),
        (building.ArrayWriter, "finish", half_of_header),
        (building, "replace_file", half_of_text),
        (Path, "rename", lambda *_: None),
        (building, "_remove_note", lambda *_: None),
    ):
        monkeypatch.setattr(owner, name, dying(name, getattr(owner, name), half))
    while True:
        writes, last = 0, last + 1
        folder = tmp_path / f"store{last}"
        try:
            build_store(spec, folder)
            break
        except Killed:
            writes = -(10**6)  # now let it finish
            build_store(spec, folder)
            if kinds[-1] == "_remove_note":
                (folder / "progress.json").unlink()  # it stays, and does no harm
            assert content(folder) == content(tmp_path / "expected"), (last, kinds[-1])
    assert last > 25
    assert kinds[-9:] == ["finish"] * 6 + ["replace_file", "rename", "_remove_note"]
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


def test_a_killed_build_of_other_settings_is_not_continued(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    other = replace(spec, pack_length=128)
    build_store(other, tmp_path / "expected")
    interrupt(spec, tmp_path / "store", monkeypatch, after=3)
    build_store(other, tmp_path / "store")
    assert "it is of other data or settings" in caplog.text
    assert content(tmp_path / "store") == content(tmp_path / "expected")


def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(stream: Any, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(building.fcntl, "flock", flock)


@pytest.mark.parametrize("locks", [True, False])
def test_what_killed_builds_of_other_data_left_is_removed_after_a_week(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    for name in ("tokens-old", "tokens-new", "old"):
        interrupt(spec, tmp_path / name, monkeypatch, after=2)
    (tmp_path / "tokens-his.building").mkdir()
    (tmp_path / "tokens-his.building" / "letters").touch()
    then = time.time() - WEEK_S - 60
    for name in ("tokens-old", "tokens-his", "old"):
        os.utime(tmp_path / f"{name}.building", (then, then))
    if not locks:
        no_locks(monkeypatch)
    build_store(spec, tmp_path / "store")
    kept = ["old.building", "store", "tokens-his.building", "tokens-new.building"]
    assert names(tmp_path) == kept


def test_a_build_that_was_only_begun_is_known_as_one(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(block: lines.Block) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        watch(patch, die)
        build_store(spec, tmp_path / "store")
    assert (tmp_path / "store.building" / "progress.json").is_file()


def test_without_locks_a_build_has_a_folder_of_its_own(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    no_locks(monkeypatch)
    assert build_store(spec, tmp_path / "store").num_documents == 26
    assert TokenStore.open(tmp_path / "store").num_documents == 26
    assert "no locks" in caplog.text
    assert names(tmp_path) == ["store"]


def test_a_file_that_changes_while_it_is_read(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch, lambda block: os.utime(tmp_path / "a.jsonl", (1, 1)))
    with pytest.raises(ValueError, match="changed while it was read"):
        build_store(spec, tmp_path / "store")
    assert names(tmp_path) == []


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


def test_a_full_disk_is_told_and_what_is_done_is_kept(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    watch(monkeypatch, lambda block: done.append(block.first_line))
    build_store(spec, tmp_path / "whole")
    size = (tmp_path / "whole" / "tokens.npy").stat().st_size
    in_all, done[:] = len(done), []
    with largest_file(size // 2), pytest.raises(FullDisk) as caught:
        build_store(spec, tmp_path / "store")
    message = r"(\S+) cannot be written \(File too large\): about ([\d,]+) bytes more are needed, and [\d,]+ are free\. Make room, .*kept"
    found = re.match(message, str(caught.value))
    assert found, caught.value
    assert found[1] == str(tmp_path / "store.building" / "tokens.npy")
    rest = sum(map(len, content(tmp_path / "whole").values())) / 2
    assert rest / 2 < int(found[2].replace(",", "")) - (1 << 16) < rest * 2
    assert is_user_error(caught.value)
    before, done[:] = len(done), []
    assert 1 < before < in_all
    build_store(spec, tmp_path / "store")
    assert len(done) == in_all - before + 1
    assert content(tmp_path / "store") == content(tmp_path / "whole")


@pytest.mark.parametrize("name", ["progress.json", "meta.json", "loss.npy"])
def test_every_write_names_its_file(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A quota that is used up when this file is written, and from then on."""
    full = False

    def fails(path: Path, write: Callable[..., Any]) -> Any:
        def fail(*arguments: Any, **options: Any) -> Any:
            nonlocal full
            full = full or path.name.startswith(name)
            if full:
                raise OSError(122, "Disk quota exceeded")
            return write(*arguments, **options)

        return fail

    real_init, real_write_text = building.ArrayWriter.__init__, Path.write_text

    def init(writer: Any, path: Path, *arguments: Any) -> None:
        real_init(writer, path, *arguments)
        stream = writer._stream
        writer._stream = SimpleNamespace(
            **{n: getattr(stream, n) for n in ("seek", "tell", "read")},
            **{n: fails(path, getattr(stream, n)) for n in ("write", "flush", "close")},
        )

    monkeypatch.setattr(building.ArrayWriter, "__init__", init)
    monkeypatch.setattr(Path, "write_text", lambda p, *a: fails(p, real_write_text)(p, *a))
    with pytest.raises(FullDisk, match=rf"^\S+/{name} cannot be written \(Disk quota exceeded\)"):
        build_store(spec, tmp_path / "store")
    assert (tmp_path / "store.building").is_dir()


def test_a_fault_of_the_program_keeps_what_is_done(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ValueError that is no mistake in the data."""
    interrupt(spec, tmp_path / "store", monkeypatch, after=2)

    def fault(block: lines.Block) -> None:
        np.zeros(3).reshape(2)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="cannot reshape"):
        watch(patch, fault)
        build_store(spec, tmp_path / "store")
    assert building.Progress.read(tmp_path / "store.building").report.num_records > 0


def test_the_first_mistake_in_a_block_is_told_whoever_finds_it(
    spec: StoreSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (tmp_path / "b.jsonl").read_text().split("\n")
    rows[4], rows[8] = rows[4].replace("the 4", "unspeakable"), "{"
    block = lines.Block("b", 0, 1, 13, 0, 1, 1, "\n".join(rows).encode())

    def encode_batch(texts: Any, **options: Any) -> Any:
        if "unspeakable" in texts:
            raise ValueError("no piece for it")
        return real(texts, **options)

    real = spec.tokenizer.encode_batch
    monkeypatch.setattr(spec.tokenizer, "encode_batch", encode_batch)
    with pytest.raises(ValueError, match=r"^b:5: no piece for it"):
        workers.documents_of(block, spec.rules)
