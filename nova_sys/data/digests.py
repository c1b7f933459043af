"""sha256 of data files, read once per job: the main rank leaves a note of them for the other ranks.

A note belongs to files of certain paths, sizes and times of change. Only ranks that start behind the main one take its word; the main
rank reads the files at every start, because somebody may have changed one without changing any of these.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from nova_sys.data.disk import replace_file
from nova_sys.data.progress import Meter

Stamp = tuple[int, int]
"""Size, and time of the last change."""

HashedFile = tuple[str, Stamp]
"""sha256 of a file's bytes, and its stamp when they were read."""


def stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def hash_files(files: Sequence[Path], *, with_bar: bool = False) -> list[HashedFile]:
    stamps = [stamp(path) for path in files]
    digests, done = [], 0
    with Meter(sum(size for size, _ in stamps), "hashed", with_bar=with_bar) as meter:
        for path in files:
            digest = hashlib.sha256()
            with open(path, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
                    done += len(block)
                    meter.show(done)
            digests.append(digest.hexdigest())
    return list(zip(digests, stamps, strict=True))


def note_digests(folder: Path, files: Sequence[Path], hashed: Sequence[HashedFile]) -> None:
    """Without room for it, the other ranks read the files themselves."""
    path = _note(folder, files, [stamp for _, stamp in hashed])
    with contextlib.suppress(OSError):
        replace_file(path, json.dumps([digest for digest, _ in hashed]))


def noted_digests(folder: Path, files: Sequence[Path]) -> list[HashedFile] | None:
    """What the main rank has noted of the files as they are now, if it has."""
    stamps = [stamp(path) for path in files]
    try:
        digests: list[str] = json.loads(_note(folder, files, stamps).read_text())
        return list(zip(digests, stamps, strict=True))
    except (OSError, ValueError):
        return None


def _note(folder: Path, files: Sequence[Path], stamps: Sequence[Stamp]) -> Path:
    identity = [(str(path.resolve()), *s) for path, s in zip(files, stamps, strict=True)]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    return folder / f"digests-{name}.json"
