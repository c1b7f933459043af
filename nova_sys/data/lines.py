"""Data files, plain or gzip, as blocks of whole lines: what one process reads and another parses."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nova_sys.data.records import DataError, Source

BLOCK_BYTES = 1 << 20
"""Text per block: enough work for a process to be worth a message, little enough to hold several per process."""

MAX_LINE_BYTES = 64 << 20
"""A longer line is not a record but another format, and would have to be held in memory whole."""

_GZIP_MAGIC = b"\x1f\x8b"
_BINARY = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
"""First bytes of files that people take for JSON lines."""


@dataclass(frozen=True)
class Block:
    """Whole lines of a file."""

    path: str
    file: int
    """Index into the list of files of a run."""
    first_line: int
    """1 is the file's first line."""
    next_line: int
    """The first line behind the block."""
    start: int
    """Where the block begins, in bytes of text (uncompressed)."""
    end: int
    bytes_on_disk: int
    """Bytes of the file, as it lies on the disk, that were read up to the end of the block."""
    data: bytes


def read_blocks(
    path: Path, file: int = 0, *, start: int = 0, first_line: int = 1
) -> Iterator[Block]:
    """A file's blocks from byte `start` of its text on, which is the beginning of line `first_line`.

    gzip is recognised by its first bytes, whatever the file is called. Raises: DataError for damaged gzip data and endless lines.
    """
    with open(path, "rb") as raw:
        compressed = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        stream = gzip.GzipFile(fileobj=raw) if compressed else raw
        try:
            stream.seek(start)
            while data := stream.read(BLOCK_BYTES):
                if not data.endswith(b"\n"):
                    data += stream.readline(MAX_LINE_BYTES)
                end, next_line = start + len(data), first_line + data.count(b"\n")
                if len(data) >= MAX_LINE_BYTES and not data.endswith(b"\n"):
                    raise DataError(
                        f"{path}:{next_line}: a line of more than {MAX_LINE_BYTES >> 20} MiB; data must be JSON lines, plain or "
                        "gzip. Convert other formats to one object per line first."
                    )
                yield Block(str(path), file, first_line, next_line, start, end, raw.tell(), data)
                start, first_line = end, next_line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{path}:{_last_whole_line(path) + 1}: damaged gzip data ({error}); a .gz file must be complete. "
                "Copy or download it again."
            ) from error


def _last_whole_line(path: Path) -> int:
    """The number of lines that damaged gzip data still gives."""
    number = 0
    try:
        with gzip.open(path, "rb") as stream:
            for number, _ in enumerate(stream, start=1):  # noqa: B007 wanted when the loop breaks off
                pass
    except (EOFError, zlib.error, gzip.BadGzipFile):
        pass
    return number


def block_lines(block: Block) -> Iterator[tuple[Source, str]]:
    """Decoded lines that are not blank, with their places. Raises: DataError for what is not UTF-8 text."""
    for number, raw in enumerate(block.data.split(b"\n"), start=block.first_line):
        source = Source(block.path, block.file, number)
        text = _decode(raw, source).strip()
        if text:
            yield source, text


def _decode(raw: bytes, source: Source) -> str:
    try:
        if b"\0" in raw:
            at = raw.index(b"\0")
            raise UnicodeDecodeError("utf-8", raw, at, at + 1, "a zero byte")
        return raw.decode("utf-8-sig" if source.line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        known = (n for start, n in _BINARY.items() if source.line == 1 and raw.startswith(start))
        name = next(known, "a binary format such as Parquet or Arrow, or another text encoding")
        raise DataError(
            f"{source}: byte {error.start + 1} of the line is 0x{raw[error.start]:02x}, not UTF-8 text; data must be JSON lines, "
            f"plain or gzip. Convert the file, which may be {name}, first."
        ) from error
