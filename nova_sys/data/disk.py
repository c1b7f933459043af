"""Writing to a disk that may be full: every error names its file, and a full disk is told as something to be put right."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk is full, a quota is used up, or the file may not be larger; reading gives none of them."""


class FullDisk(ValueError):
    """What was to be prepared does not fit. What is done by then is kept."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of a stream's write, which knows no file, gets this one's name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_file(path: Path, text: str) -> None:
    """The whole text, or what was there before."""
    partial = path.with_name(f"{path.name}.partial")
    with naming(path):
        partial.write_text(text)
        partial.replace(path)


@contextlib.contextmanager
def telling_full_disk(folder: Path, bytes_needed: Callable[[], int], remedy: str) -> Iterator[None]:
    """Raises: FullDisk with the file, the bytes that are needed and free in `folder`, and `remedy`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        free = shutil.disk_usage(folder).free
        raise FullDisk(
            f"{error.filename or folder} cannot be written ({error.strerror}): about {bytes_needed():,} bytes more are needed, and "
            f"{free:,} are free. {remedy}"
        ) from error
