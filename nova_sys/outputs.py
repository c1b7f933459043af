"""Files that a command writes for its user: never over its own input, and whole or not at all."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


def refuse_output(flag: str, path: Path, inputs: Iterable[Path]) -> None:
    """Raises: ValueError when `path` cannot be written, or is one of the files that are read."""
    try:
        is_stream = path.exists() and not path.is_file()
        writable = not path.is_dir() and os.access(path if is_stream else path.parent, os.W_OK)
        read = next((i for i in inputs if path.exists() and i.exists() and path.samefile(i)), None)
    except OSError as error:
        raise ValueError(
            f"{flag} {path}: cannot be written ({error.strerror}); name a file in a folder that exists"
        ) from None
    if not writable:
        raise ValueError(f"{flag} {path}: cannot be written; name a file in a folder that exists")
    if read is not None:
        raise ValueError(
            f"{flag} {path}: is the file {read}, which is read; an output never takes the place of an input. Name another file"
        )


@contextmanager
def whole_file(flag: str, path: Path) -> Iterator[TextIO]:
    """A text file that appears at `path` when all of it is written; until then, and after an error, what was there stays.

    A device or a pipe is written to directly. Raises: ValueError when the disk refuses.
    """
    path = path.resolve()
    is_stream = path.exists() and not path.is_file()
    partial = path if is_stream else path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("w", encoding="utf-8") as out:
            yield out
        if not is_stream:
            partial.replace(path)
    except OSError as error:
        raise ValueError(
            f"{flag} {path}: cannot be written ({error.strerror}); make room, or name another file"
        ) from None
    finally:
        if not is_stream:
            partial.unlink(missing_ok=True)


def say(line: str) -> None:
    """On standard output. A reader who has seen enough ends the command, without a word; a full disk with one."""
    try:
        print(line, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed again at the end
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)
        raise ValueError(
            f"standard output cannot be written ({error.strerror}); make room, or name a file with --out"
        ) from None
