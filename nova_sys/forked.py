"""A function in a copy of this process: sees the memory as it is now, while this process goes on changing it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
from collections.abc import Callable
from typing import IO, Generic, TypeVar

import torch

from nova_sys.errors import die_with_parent
from nova_sys.stopping import held_signals, ignore_signals

T = TypeVar("T")
KILL_S = 10.0
"""A process that waits for a disk which does not answer outlives even SIGKILL, and is left to it."""


class ForkedCall(Generic[T]):
    """`function()` in a forked process, which never outlives this one, and finishes when a signal ends only the training.

    For functions that write host memory to files: a copy of a process has no other threads and may not touch a GPU.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self._answer: IO[bytes] | None = None
        self._failed: OSError | None = None
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=self._run, args=(function, os.getpid()), daemon=True)
        try:
            self._answer = os.fdopen(os.memfd_create("answer"), "w+b")  # a pipe would fill up
            with held_signals():
                self._process.start()
        except OSError as error:  # `result` raises it: other ranks wait for this one's, good or bad
            self._failed = error

    def _run(self, function: Callable[[], T], parent: int) -> None:
        die_with_parent(parent)
        ignore_signals()
        gc.disable()  # the parent's GPU tensors must not be freed here
        torch.set_num_threads(1)  # the parent's threads for operators do not exist here
        answer: tuple[T | None, Exception | None] = (None, None)
        try:
            answer = (function(), None)
        except Exception as error:
            answer = (None, error)
        assert self._answer is not None
        pickle.dump(answer, self._answer)
        self._answer.flush()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def is_running(self) -> bool:
        return self._failed is None and self._process.is_alive()

    def result(self) -> T:
        """Waits for the process. Raises: what `function` raised, OSError when no process could be forked, or ChildProcessError
        when it was killed."""
        if self._failed is not None:
            self._close()
            raise OSError(f"the process that writes cannot be started: {self._failed}")
        assert self._answer is not None
        self._process.join()
        self._answer.seek(0)
        text = self._answer.read()
        self._close()
        if self._process.exitcode != 0:
            raise ChildProcessError(
                f"the process that writes ended with exit code {self._process.exitcode}"
                + ("; is the machine out of memory?" if self._process.exitcode == -9 else "")
            )
        value, error = pickle.loads(text)
        if error is not None:
            raise error
        return value

    def kill(self) -> None:
        if self._failed is None:
            self._process.kill()
            self._process.join(KILL_S)
        self._close()

    def _close(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None
