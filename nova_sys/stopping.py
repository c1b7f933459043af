"""SIGTERM and SIGINT: a run finishes its step and saves; a command that is not training yet ends soon.

Python runs signal handlers in the main thread only, which may be waiting in native code for another rank. So the interpreter also
writes each signal into a pipe, and a thread reads it: that thread tells the user, and ends the process where the main thread does not.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from nova_sys.errors import end_at_once

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE_SIGNAL_S = 3.0
"""Signals within so many seconds count as one: a cluster manager or a terminal reaches a rank both directly and by its launcher."""
UNWIND_S = 5.0
"""How long a process that does not train yet may take to clean up."""


class StopRequest:
    """Whether this process shall stop. reason: a signal's name, or another; None until there is one.
    agreed: some rank has a reason, and all know of it."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.agreed = False
        self._received_s: float | None = None
        self._starting = self._training = self._unwinding = self._closed = False

    @property
    def is_set(self) -> bool:
        return self.reason is not None

    def start_training(self, on_any_rank: Callable[[bool], bool] = bool) -> None:
        """From here on a first signal is only noted: the loop asks `is_set` in every step.

        Raises: SystemExit when a signal has come already, to whichever rank: else some ranks would train, and wait for those that
        it has ended.
        Args:   on_any_rank: whether a thing is true on some rank; a collective.
        """
        self._starting = True
        try:
            ends = on_any_rank(self.is_set)
        except RuntimeError:  # a rank that was not here yet has ended
            if not self.is_set:
                raise
            ends = True
        if ends:
            self._unwinding = True
            sys.exit(128 + signal.Signals[self.reason or "SIGTERM"])
        self._training = True

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        if not (self._starting or self._unwinding):
            self._unwinding = True
            sys.exit(128 + number)

    def _read(self, pipe: int) -> None:
        """The thread: one byte per signal that Python handles, also for others than us; its number, 0 at the end."""
        while number := int.from_bytes(os.read(pipe, 1), "little"):
            if number in SIGNALS:
                self._receive(signal.Signals(number))

    def _receive(self, number: signal.Signals) -> None:
        if self._received_s is None:
            self._received_s = time.monotonic()
            self.reason = number.name
            if self._training:
                logger.info(
                    "%s: finishing this step, then a checkpoint; a second signal ends the run at once",
                    number.name,
                )
            else:
                logger.info("%s: ended before the first step, so nothing was saved", number.name)
                timer = threading.Timer(UNWIND_S, self._give_up, (number,))
                timer.daemon = True
                timer.start()
        elif time.monotonic() - self._received_s > ONE_SIGNAL_S:
            self._end(number)

    def _give_up(self, number: signal.Signals) -> None:
        if not self._training:
            self._end(number)

    def _end(self, number: signal.Signals) -> None:
        if not self._closed:
            end_at_once(f"ended by {number.name}", 128 + number, speaks=False)


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Inside, SIGTERM and SIGINT are requests to this process. For main threads."""
    request = StopRequest()
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    thread = threading.Thread(target=request._read, args=(reads,), name="signals", daemon=True)
    thread.start()
    earlier_pipe = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    earlier = {number: signal.signal(number, request._in_main_thread) for number in SIGNALS}
    for number in SIGNALS:
        signal.siginterrupt(number, False)  # collectives and file writes go on
    _listening.append(request)
    try:
        yield request
    finally:
        _listening.remove(request)
        request._closed = True
        for number, handler in earlier.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(earlier_pipe)
        os.write(writes, b"\0")
        thread.join()
        os.close(reads)
        os.close(writes)


@contextmanager
def held_signals() -> Iterator[None]:
    """SIGTERM and SIGINT wait until the end, so that a process forked inside starts without them and can `ignore_signals`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """For a process that has to finish: launchers and terminals signal whole groups of processes."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


_listening: list[StopRequest] = []


def _forget_in_fork() -> None:
    """In a forked process the signals have their usual effect, and are not written into its parent's pipe."""
    if _listening:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_fork)
