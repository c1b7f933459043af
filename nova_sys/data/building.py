"""A store while it is written: arrays that only grow, and a note of how far they are valid.

`<store>.building` holds the arrays and `progress.json`, which is replaced after every block, when the block's rows have left this
process. A build that was killed at any moment goes on behind the last block noted: what the arrays hold beyond is cut off, and what
they hold before must have its checksum. Nothing is copied or written twice. A folder is only continued for the key it was begun for.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nova_sys.data.disk import naming, replace_file
from nova_sys.data.documents import Documents
from nova_sys.data.lines import Block
from nova_sys.data.token_store import ARRAYS, StoreReport, seal

logger = logging.getLogger(__name__)

_HEADER_BYTES = 128
_PROGRESS = "progress.json"
_LEFT_BEHIND_AFTER_S = 7 * 24 * 3600.0


class ArrayWriter:
    """A .npy file that grows: the header, whose size is fixed, is written last."""

    def __init__(self, path: Path, name: str, rows: int = 0, checksum: int = 0) -> None:
        """Goes on behind `rows` rows. Raises: ValueError when the file does not hold these."""
        dtype, self._row_shape = ARRAYS[name]
        self._dtype = np.dtype(dtype)
        self.rows, self.checksum = rows, checksum
        self._path = path
        self._stream = open(path, "r+b" if rows else "w+b")  # noqa: SIM115 closed by close()
        if not rows:
            self._stream.write(bytes(_HEADER_BYTES))
            return
        left = rows * self._dtype.itemsize * int(np.prod(self._row_shape))
        self._stream.seek(_HEADER_BYTES)
        found = 0
        while left and (data := self._stream.read(min(left, 1 << 20))):
            found, left = zlib.crc32(data, found), left - len(data)
        if left or found != checksum:
            self._stream.close()
            raise ValueError(f"{path.name} does not hold what was noted")
        self._stream.truncate(self._stream.tell())

    def append(self, rows: np.ndarray) -> None:
        data = rows.astype(self._dtype, copy=False).tobytes()
        self.rows += len(rows)
        self.checksum = zlib.crc32(data, self.checksum)
        with naming(self._path):
            self._stream.write(data)
            self._stream.flush()

    def finish(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.rows, *self._row_shape),
        }
        with naming(self._path):
            self._stream.seek(0)
            np.lib.format.write_array_header_1_0(self._stream, header)
            assert self._stream.tell() == _HEADER_BYTES
            self._stream.close()

    def close(self) -> None:
        """Leaves what is written. What a failed write left in the stream fails again, and is not noted anyway."""
        with contextlib.suppress(OSError):
            self._stream.close()


@dataclass
class Progress:
    """What is written so far, and where the next block begins."""

    key: str
    """Of the store to be."""
    file: int = 0
    start: int = 0
    first_line: int = 1
    bytes_on_disk: int = 0
    """Read of this file."""
    file_records: int = 0
    """Of the file that the next block belongs to."""
    file_documents: int = 0
    first_problem: str | None = None
    """In that file."""
    report: StoreReport = field(default_factory=StoreReport)
    written: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Rows and checksum of each array."""

    @staticmethod
    def read(folder: Path) -> Progress:
        values: dict[str, Any] = json.loads((folder / _PROGRESS).read_text())
        report = StoreReport(**values.pop("report"))
        return Progress(**values, report=report)

    def write(self, folder: Path) -> None:
        replace_file(folder / _PROGRESS, json.dumps(asdict(self)))

    @property
    def bytes_written(self) -> int:
        """By all arrays."""
        return sum(
            rows * np.dtype(ARRAYS[name][0]).itemsize * int(np.prod(ARRAYS[name][1]))
            for name, (rows, _) in self.written.items()
        )


class GrowingStore:
    """The arrays of a store under construction, in `folder`; continues what it finds there."""

    def __init__(self, folder: Path, key: str, *, share_prefix: bool) -> None:
        self.folder = folder
        self._share_prefix = share_prefix
        self.progress = Progress(key)
        self._writers: dict[str, ArrayWriter] = {}
        if (folder / _PROGRESS).exists():
            try:
                self._continue(key)
                return
            except (OSError, ValueError, TypeError, KeyError) as error:
                logger.warning("%s cannot be continued (%s); it begins anew", folder, error)
                self.close()
        self.progress = Progress(key)
        self._writers = {name: ArrayWriter(folder / f"{name}.npy", name) for name in ARRAYS}
        for name in ("part_offsets", "document_parts"):
            self._writers[name].append(np.zeros(1, np.int64))
        self._note()

    def _continue(self, key: str) -> None:
        self.progress = Progress.read(self.folder)
        if self.progress.key != key:
            raise ValueError("it is of other data or settings")
        for name, (rows, checksum) in self.progress.written.items():
            self._writers[name] = ArrayWriter(self.folder / f"{name}.npy", name, rows, checksum)
        logger.info(
            "data: continuing behind %s records that are tokenised already",
            f"{self.progress.report.num_records:,}",
        )

    def append(self, block: Block, documents: Documents) -> None:
        """Takes in the next block of the current file; from here on it survives a kill."""
        at, lengths_NW = self.progress, documents.lengths_NW
        num_documents, width = lengths_NW.shape
        copies = 1 if self._share_prefix else width - 1
        rows = {
            "tokens": documents.tokens,
            "loss": documents.loss,
            "part_offsets": at.report.num_tokens + np.cumsum(lengths_NW),
            "document_parts": (at.report.num_documents + np.arange(1, num_documents + 1)) * width,
            "lengths": lengths_NW.sum(axis=1) + (copies - 1) * lengths_NW[:, 0],
            "source": documents.source,
        }
        for name, writer in self._writers.items():
            writer.append(rows[name])
        at.report.add(documents.report)
        at.file_records += documents.report.num_records
        at.file_documents += documents.report.num_documents
        at.first_problem = at.first_problem or documents.first_problem
        at.start, at.first_line = block.end, block.next_line
        at.bytes_on_disk = block.bytes_on_disk
        self._note()

    def next_file(self) -> None:
        """The current file is done."""
        at = self.progress
        at.file, at.start, at.first_line = at.file + 1, 0, 1
        at.bytes_on_disk = 0
        at.file_records, at.file_documents, at.first_problem = 0, 0, None
        self._note()

    def _note(self) -> None:
        self.progress.written = {n: (w.rows, w.checksum) for n, w in self._writers.items()}
        self.progress.write(self.folder)

    def finish(self, meta: dict[str, Any]) -> None:
        """Makes the folder a store, which `publish` gives its name."""
        for writer in self._writers.values():
            writer.finish()
        checksums = {name: writer.checksum for name, writer in self._writers.items()}
        sealed = seal({**meta, "checksums": checksums})
        replace_file(self.folder / "meta.json", json.dumps(sealed, indent=1))

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers = {}


def publish(growing: Path, folder: Path) -> None:
    """Gives the finished store its name, unless another process was faster with the same one."""
    try:
        growing.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(growing)
    else:
        _remove_note(folder)  # up to here a killed build could go on


def _remove_note(folder: Path) -> None:
    (folder / _PROGRESS).unlink()


def growing_folder(store: Path) -> Path:
    """Where `store` grows, and where the next build finds it."""
    return store.with_name(f"{store.name}.building")


@contextlib.contextmanager
def building_folder(store: Path) -> Iterator[Path]:
    """The folder in which `store` grows, for one process at a time: a second one waits until the first has finished or died."""
    folder = growing_folder(store)
    _remove_left_behind(store.parent, folder)
    try:
        lock = _lock(store.with_name(f"{store.name}.lock"))
    except OSError as error:
        # A file system without locks: a folder of our own, which nobody could find and continue.
        logger.warning("no locks in %s (%s): an interrupted build will begin anew", store, error)
        folder = Path(
            tempfile.mkdtemp(prefix=f"{store.name}.", suffix=".building", dir=store.parent)
        )
        folder.chmod(0o755)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        folder.mkdir(exist_ok=True)
        yield folder
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # when another process was faster, it is empty
        Path(lock.name).unlink(missing_ok=True)
        lock.close()


def _lock(path: Path, *, wait: bool = True) -> Any:
    """A locked file of this name. The kernel opens the lock of a process that ends, however it ends.

    Raises: BlockingIOError when it is not to wait, another OSError where there are no locks; neither leaves a file behind.
    """
    while True:
        stream = open(path, "a")  # noqa: SIM115 the lock lasts as long as it is open
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                stream.close()
                raise
            logger.info("data: another process tokenises the same data; waiting for it")
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:
            stream.close()
            path.unlink(missing_ok=True)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(stream.fileno())):
                return stream
        stream.close()  # the process before us has removed it since


def _remove_left_behind(cache: Path, wanted: Path) -> None:
    """Deletes what killed builds of other data left here, once nobody has come back for it in a week."""
    for folder in set(cache.glob("tokens-*.building")) - {wanted}:
        with contextlib.suppress(OSError):
            age_s = time.time() - folder.stat().st_mtime
            if age_s > _LEFT_BEHIND_AFTER_S and (folder / _PROGRESS).is_file():
                _remove_unless_in_use(folder)


def _remove_unless_in_use(folder: Path) -> None:
    path = folder.with_suffix(".lock")
    try:
        lock = _lock(path, wait=False)
    except BlockingIOError:
        return
    except OSError:
        shutil.rmtree(folder)  # no locks here: a week without a block must do
        return
    with lock:
        shutil.rmtree(folder)
        path.unlink()
