"""Notices that a rank has stopped answering, leaves a report of where every rank was, and ends the job.

A rank says what it is about to do: `with watchdog.phase("data"): ...`. When a watched phase lasts longer than `timeout_s`, on
whichever rank, that rank calls all others through the job's key-value store; each writes its step, phase and stacks into
`<folder>/<start of the job>-rank<k>.txt` and ends with exit code 3, and one of them says which rank the others waited for.

Three things watch, so that no single one has to work:
- a thread that looks at the clock only, and needs neither network nor other ranks;
- a thread that talks to the store: once a second it says where this rank is and that it lives, and hears when another rank calls. Each
  rank listens for the one before it, in every phase: one whose interpreter has not run for `timeout_s`, or whose machine is gone, is a
  hang as well, however long its work may take;
- faulthandler's timer in C, for a rank whose interpreter is held in native code: stacks into the same file, exit code 1.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TextIO

from nova_kernels.ranges import profiler_range
from nova_sys.errors import HANG_EXIT_CODE, end_at_once
from nova_sys.hang_report import (
    ADVICE,
    Sighting,
    explain,
    from_json,
    main_thread_place,
    to_json,
)

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

FIRST_STEP_S = 600.0
"""The first step may take this long whatever the timeout: it compiles kernels and opens connections."""
POLL_S = 1.0
_STACK = "most recent call first"  # faulthandler's words: a report that has them holds stacks
_KEY = "nova/watchdog"
_GONE = b"gone"


def grace_s(timeout_s: float) -> float:
    """Seconds that ranks give each other to write their reports."""
    return max(5.0, 0.05 * timeout_s)


def collective_timeout_s(timeout_s: float) -> float:
    """A collective gives up this late, so that in a watched phase, also in the first step, the watchdog, which knows more, comes first."""
    return max(timeout_s, FIRST_STEP_S) + 2 * grace_s(timeout_s)


class _Now(NamedTuple):
    """What a rank is doing: replaced as a whole, so that other threads never see half of it."""

    phase: str
    limit_s: float | None
    """None: not watched."""
    began: float
    passed: int
    """Phases so far. All ranks go through the same ones: who has passed fewer is waited for."""


class Watchdog:
    """One per rank and job. `step` is the current optimizer step, counted from 1; `warm` is set after this process's first one.

    Args:  store: the job's; None for a single rank.  folder: of the reports; None: they go to standard error.
           started: the job's start, the same text on every rank.  flight_recorder: the last collectives as torch dumps them.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        timeout_s: float,
        store: Store | None = None,
        folder: Path | None = None,
        started: str = "",
        flight_recorder: Callable[[], bytes] | None = None,
    ) -> None:
        self.step, self.warm = 0, False
        self._rank, self._world_size, self._timeout_s = rank, world_size, timeout_s
        self._grace_s = grace_s(timeout_s)
        self._folder, self._started, self._flight_recorder = folder, started, flight_recorder
        self._out: TextIO | None = None
        self._now = _Now("", None, time.monotonic(), 0)
        # what faulthandler's timer was last set to, and when
        self._armed: tuple[float | None, float] = (None, 0.0)
        self._closed, self._called, self._wake = (threading.Event() for _ in range(3))
        self._tripping = threading.Lock()
        self._mine: Sighting | None = None
        self._told: tuple[str, bool] | None = None  # what the ranks agreed on; whether to print it
        self._neighbour = (rank - 1) % world_size
        self._listens, self._signs_of_life, self._heard = store is not None, 0, b""
        self._gathered = threading.Event()
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if store is not None:
            talk = threading.Thread(
                target=self._talk, args=(store,), name="watchdog-store", daemon=True
            )
            self._threads.append(talk)
        for thread in self._threads:
            thread.start()

    @contextmanager
    def phase(self, name: str, *, watched: bool = True) -> Iterator[None]:
        """Says what this rank does inside, to profilers too; afterwards it does what it did before, and the clock starts anew."""
        outer = self._now
        limit_s = self._timeout_s if self.warm else max(self._timeout_s, FIRST_STEP_S)
        self._enter(name, limit_s if watched else None)
        try:
            with profiler_range(f"nova.{name}"):
                yield
        finally:
            self._enter(outer.phase, outer.limit_s)

    def progress(self) -> None:
        """Starts the phase's clock anew: a step may take longer than the timeout if its micro-batches do not."""
        self._now = self._now._replace(began=time.monotonic())
        self._arm()

    def raised(self, error: BaseException) -> None:
        """Called on an error that ends the run. Returns unless it is a collective's timeout, or ranks are reporting a hang already."""
        timed_out = isinstance(error, RuntimeError) and re.search(r"(?i)time(d |-|)out", str(error))
        if timed_out or self._called.is_set() or self._mine is not None:
            self._trip(f"an error ended the wait: {error}", error)

    def close(self) -> None:
        """Stops watching; the report, which holds none, is removed."""
        faulthandler.cancel_dump_traceback_later()
        self._closed.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(timeout=5)
        if self._out is not None:
            self._out.close()
        if self._out is not None and self._folder is not None:
            with contextlib.suppress(OSError):  # another rank's may still be there
                self._report_path.unlink()
                self._folder.rmdir()

    # -- threads ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        quiet, signs = 0, 0  # polls, not seconds: none of them passes while this process is stopped
        while not self._closed.wait(POLL_S):
            quiet = quiet + 1 if self._listens and self._signs_of_life == signs else 0
            now, signs = self._now, self._signs_of_life
            if quiet * POLL_S > self._timeout_s:
                self._trip(
                    f"rank {self._neighbour} has given no sign of life for {quiet * POLL_S:g} s"
                )
            if self._called.is_set():
                self._trip("another rank saw no progress")
            if now.limit_s is not None and time.monotonic() - now.began > now.limit_s:
                self._trip(f"this rank is in phase {now.phase!r} for more than {now.limit_s:g} s")

    def _talk(self, store: Store) -> None:
        """Every line here may wait for a network that is gone; nothing waits for this thread without a limit."""
        try:
            store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]  # a connection of its own: the main thread may wait at the other
            said, beats = None, 0
            while not self._closed.is_set() and self._mine is None:
                now = self._now
                if now is not said:
                    store.set(f"{_KEY}/seen/{self._rank}", to_json(self._sighting(now)))
                    said = now
                beats += 1
                store.set(f"{_KEY}/beat/{self._rank}", f"{beats}")
                self._listen(store)
                if store.check([f"{_KEY}/call"]):
                    self._called.set()
                self._wake.wait(POLL_S)
            if self._mine is not None:
                self._told = self._gather(store, self._mine)
            else:
                store.set(f"{_KEY}/beat/{self._rank}", _GONE.decode())  # at work no more
        except Exception as error:
            self._listens = False
            if self._mine is not None:
                print(f"[rank {self._rank}] the job's store: {error}", file=sys.stderr)
        finally:
            self._gathered.set()

    def _listen(self, store: Store) -> None:
        key = f"{_KEY}/beat/{self._neighbour}"
        beat = store.get(key) if store.check([key]) else self._heard
        if beat != self._heard or beat == _GONE:
            self._heard = beat
            self._signs_of_life += 1

    def _gather(self, store: Store, mine: Sighting) -> tuple[str, bool]:
        """Posts this rank's sighting and waits for the others'; the lowest rank that answers says what came of it."""
        store.set(f"{_KEY}/report/{self._rank}", to_json(mine))
        num_reports = store.add(f"{_KEY}/count", 1)
        store.set(f"{_KEY}/call", "")
        patience = time.monotonic() + self._grace_s
        while num_reports < self._world_size and time.monotonic() < patience:
            time.sleep(0.2)
            num_reports = store.add(f"{_KEY}/count", 0)
        ranks = range(self._world_size)
        if self._rank != next(r for r in ranks if store.check([f"{_KEY}/report/{r}"])):
            store.wait([f"{_KEY}/message"], timedelta(seconds=self._grace_s))
            return store.get(f"{_KEY}/message").decode(), False
        found = {r: from_json(store, f"{_KEY}/report/{r}") for r in ranks}
        reports = {r: report for r, report in found.items() if report is not None}
        silent = {r: from_json(store, f"{_KEY}/seen/{r}") for r in ranks if r not in reports}
        message = explain(reports, silent, self._timeout_s, self._reports)
        store.set(f"{_KEY}/message", message)
        return message, True

    # -- the end ----------------------------------------------------------------------------------------------------

    def _trip(self, why: str, error: BaseException | None = None) -> NoReturn:
        with self._tripping:  # the first to come ends the process
            # should any line below wait for a file system that is gone
            faulthandler.dump_traceback_later(5 * self._grace_s, exit=True)
            mine = self._sighting(self._now, *main_thread_place(error))
            try:
                self._write_report(mine, why, error)
            except OSError as problem:  # a full disk
                print(f"[rank {self._rank}] no report: {problem}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
            self._mine = mine
            self._wake.set()
            if len(self._threads) > 1:
                self._gathered.wait(3 * self._grace_s)
            message, speaks = self._told or (self._explain_alone(mine), True)
            end_at_once(message, HANG_EXIT_CODE, speaks=speaks)

    def _explain_alone(self, mine: Sighting) -> str:
        if self._world_size == 1:
            return explain({self._rank: mine}, {}, self._timeout_s, self._reports)
        return (
            f"{mine.place}: rank {self._rank} waited longer than parallel.timeout_s = {self._timeout_s:g}, and the job's store does not "
            f"answer either: its machine, which is that of rank 0, or the network is gone. The job was ended.\n"
            f"  {mine}: {mine.place}, at {mine.where}\n{ADVICE.format(files=self._reports)}"
        )

    def _write_report(self, mine: Sighting, why: str, error: BaseException | None) -> None:
        out = self._open()
        names = ", ".join(f"0x{t.ident or 0:016x} {t.name}" for t in threading.enumerate())
        in_phase_s = time.monotonic() - self._now.began
        print(
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}, {mine} of {self._world_size} ranks\n"
            f"{mine.place}, for {in_phase_s:.1f} s; at {mine.where}\n{why}\nthreads: {names}\n",
            file=out,
            flush=True,
        )
        if error is not None:
            print("".join(traceback.format_exception(error)), file=out, flush=True)
        faulthandler.dump_traceback(file=out)
        if self._flight_recorder is not None and self._folder is not None:
            try:
                path = self._folder / f"{self._started}-nccl-rank{self._rank}"
                path.write_bytes(self._flight_recorder())
            except Exception as problem:
                print(f"no flight recorder dump: {problem}", file=out, flush=True)

    # -- small parts ------------------------------------------------------------------------------------------------

    @property
    def _report_path(self) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._started}-rank{self._rank}.txt"

    @property
    def _reports(self) -> str:
        where = "above" if self._folder is None else self._folder / f"{self._started}-rank*.txt"
        return f"{where}"

    def _enter(self, name: str, limit_s: float | None) -> None:
        self._now = _Now(name, limit_s, time.monotonic(), self._now.passed + 1)
        self._arm()

    def _arm(self) -> None:
        """faulthandler's timer; the other ranks wait for a report as long as it waits for the watching thread."""
        limit_s, now = self._now.limit_s, time.monotonic()
        if limit_s == self._armed[0] and now - self._armed[1] < self._grace_s / 4:
            return  # each call below starts a thread
        if limit_s is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            faulthandler.dump_traceback_later(limit_s + self._grace_s, exit=True, file=self._open())
        self._armed = (limit_s, now)

    def _open(self) -> TextIO:
        """The report, opened before it is needed: the timer in C cannot open files. Standard error where no file can be written."""
        if self._out is None and self._folder is not None:
            try:
                self._report_path.parent.mkdir(parents=True, exist_ok=True)
                if self._rank == 0:
                    self._remove_unused()
                self._out = self._report_path.open("w")
                print(f"{self._sighting(self._now)}: a report follows", file=self._out, flush=True)
            except OSError as problem:
                print(f"[rank {self._rank}] no report file: {problem}", file=sys.stderr)
                self._folder, self._out = None, None
        if self._out is None:
            self._out = open(2, "w", closefd=False)  # noqa: SIM115
        return self._out

    def _remove_unused(self) -> None:
        """Earlier jobs that were killed left reports without stacks."""
        assert self._folder is not None
        for path in self._folder.glob("*-rank*.txt"):
            with contextlib.suppress(OSError):
                if not path.name.startswith(self._started) and _STACK not in path.read_text():
                    path.unlink()

    def _sighting(self, now: _Now, where: str = "", waits: bool = False) -> Sighting:
        host, pid = socket.gethostname(), os.getpid()
        phase = now.phase or ("between phases" if self.step else "setup")
        return Sighting(self._rank, host, pid, self.step, phase, now.passed, where, waits)
