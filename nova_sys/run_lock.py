"""One run at a time in a run folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)


class RunLock:
    """`<run.dir>/.lock`, from `acquire` until `release` or until this process ends in whatever way.

    A lock of the process (fcntl): forked processes do not inherit it, and the kernel drops it with the process, so that a run that was
    killed is never in the way of its continuation. NFS knows it too.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / ".lock"
        self._file: IO[bytes] | None = None

    def acquire(self) -> None:
        """Raises: ValueError when another process holds it, or the folder cannot be written to."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+b", buffering=0)
        except OSError as error:
            raise ValueError(
                f"run.dir={self._path.parent} cannot be written to ({error.strerror}); choose another run.dir, or see to the disk"
            ) from None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = self._path.read_text().strip() or "an unknown process"
                raise ValueError(
                    f"run.dir={self._path.parent} is in use by another run ({holder}); wait for its end or stop it, "
                    "or choose another run.dir"
                ) from None
            logger.warning(
                "%s: no locks on this file system (%s): do not start two runs in one folder",
                self._path,
                error.strerror,
            )
        self._say(f"pid {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")  # fmt: skip

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _say(self, holder: str) -> None:
        assert self._file is not None
        try:
            self._file.truncate(0)
            self._file.write(holder.encode())
        except OSError:  # a full disk; the lock holds all the same
            logger.warning("%s: cannot be written to", self._path)
