"""A function in a copy of this process: sees the memory as it is now, while this process goes on changing it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from nova_sys.errors import die_with_parent
from nova_sys.stopping import held_signals, ignore_signals

T = TypeVar("T")


class ForkedCall(Generic[T]):
    """`function()` in a forked process, which never outlives this one, and finishes when a signal ends only the training.

    For functions that write host memory to files: a copy of a process has no other threads and may not touch a GPU.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self._answer = os.fdopen(os.memfd_create("answer"), "w+b")  # a pipe would fill up
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=self._run, args=(function, os.getpid()), daemon=True)
        with held_signals():
            self._process.start()

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
        pickle.dump(answer, self._answer)
        self._answer.flush()

    def is_running(self) -> bool:
        return self._process.is_alive()

    def result(self) -> T:
        """Waits for the process. Raises: what `function` raised, or ChildProcessError when the process was killed."""
        self._process.join()
        self._answer.seek(0)
        text = self._answer.read()
        self._answer.close()
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
        self._process.kill()
        self._process.join()
