"""Notices that a rank has stopped answering, leaves a report of where every rank was, and ends the job.

A rank says what it is about to do: `with watchdog.phase("data"): ...`. When a watched phase lasts longer than `timeout_s`, on
whichever rank, that rank calls all others through the job's key-value store; each writes its step, phase and stacks into
`<folder>/<start of the job>-rank<k>.txt` and ends with exit code 3, and one of them says which rank the others waited for.

Three things watch, so that no single one has to work:
- a thread that looks at the clock only, and needs neither network nor other ranks;
- a thread that talks to the store: it says where this rank is, once a second, and hears when another rank calls;
- faulthandler's timer in C, for a rank whose interpreter is held in native code: stacks into the same file, exit code 1.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TextIO

from nova_sys.errors import HANG_EXIT_CODE, OUR_PACKAGES, end_at_once

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

FIRST_STEP_S = 600.0
"""The first step may take this long whatever the timeout: it compiles kernels and opens connections."""
POLL_S = 1.0
NUM_LISTED = 8
ADVICE = (
    "Every stack: {files}. Usual causes: a process stopped, swapped or out of memory; a GPU, machine, network or file system that no "
    "longer answers; an endless loop in code or data. If steps are only slow, raise parallel.timeout_s. The same command resumes from "
    "the last checkpoint"
)
WAITING = ("torch.distributed", "megatron.core")
"""Modules in which a main thread waits for other ranks."""
_STACK = "most recent call first"  # faulthandler's words: a report that has them holds stacks
_KEY = "nova/watchdog"


def grace_s(timeout_s: float) -> float:
    """Seconds that ranks give each other to write their reports."""
    return max(5.0, 0.05 * timeout_s)


def collective_timeout_s(timeout_s: float) -> float:
    """A collective gives up this late, so that in a watched phase the watchdog, which knows more, comes first."""
    return timeout_s + 2 * grace_s(timeout_s)


class _Now(NamedTuple):
    """What a rank is doing: replaced as a whole, so that other threads never see half of it."""

    phase: str
    limit_s: float | None
    """None: not watched."""
    began: float
    passed: int
    """Phases so far. All ranks go through the same ones: who has passed fewer is waited for."""


@dataclass(frozen=True)
class Sighting:
    """Where a rank was. where: its main thread's place in the code. waits: that place is inside a collective."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    passed: int
    where: str = ""
    waits: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def place(self) -> str:
        return f"step {self.step}, {self.phase}" if self.step else self.phase


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
        """Says what this rank does inside; afterwards it does what it did before, and the clock starts anew."""
        outer = self._now
        limit_s = self._timeout_s if self.warm else max(self._timeout_s, FIRST_STEP_S)
        self._enter(name, limit_s if watched else None)
        try:
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
        while not self._closed.wait(POLL_S):
            now = self._now
            if self._called.is_set():
                self._trip("another rank saw no progress")
            if now.limit_s is not None and time.monotonic() - now.began > now.limit_s:
                self._trip(f"this rank is in phase {now.phase!r} for more than {now.limit_s:g} s")

    def _talk(self, store: Store) -> None:
        """Every line here may wait for a network that is gone; nothing waits for this thread without a limit."""
        try:
            store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]  # a connection of its own: the main thread may wait at the other
            said = None
            while not self._closed.is_set() and self._mine is None:
                now = self._now
                if now is not said:
                    store.set(f"{_KEY}/seen/{self._rank}", _to_json(self._sighting(now)))
                    said = now
                if store.check([f"{_KEY}/call"]):
                    self._called.set()
                self._wake.wait(POLL_S)
            if self._mine is not None:
                self._told = self._gather(store, self._mine)
        except Exception as error:
            if self._mine is not None:
                print(f"[rank {self._rank}] the job's store: {error}", file=sys.stderr)
        finally:
            self._gathered.set()

    def _gather(self, store: Store, mine: Sighting) -> tuple[str, bool]:
        """Posts this rank's sighting and waits for the others'; the lowest rank that answers says what came of it."""
        store.set(f"{_KEY}/report/{self._rank}", _to_json(mine))
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
        found = {r: _from_json(store, f"{_KEY}/report/{r}") for r in ranks}
        reports = {r: report for r, report in found.items() if report is not None}
        silent = {r: _from_json(store, f"{_KEY}/seen/{r}") for r in ranks if r not in reports}
        message = explain(reports, silent, self._timeout_s, self._reports)
        store.set(f"{_KEY}/message", message)
        return message, True

    # -- the end ----------------------------------------------------------------------------------------------------

    def _trip(self, why: str, error: BaseException | None = None) -> NoReturn:
        with self._tripping:  # the first to come ends the process
            # should any line below wait for a file system that is gone
            faulthandler.dump_traceback_later(5 * self._grace_s, exit=True)
            mine = self._sighting(self._now, *_main_thread_place(error))
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
        """The report, opened before it is needed: the timer in C cannot open files."""
        if self._out is None and self._folder is None:
            self._out = open(2, "w", closefd=False)  # noqa: SIM115
        elif self._out is None:
            self._report_path.parent.mkdir(parents=True, exist_ok=True)
            if self._rank == 0:
                self._remove_unused()
            self._out = self._report_path.open("w")
            print(f"{self._sighting(self._now)}: a report follows", file=self._out, flush=True)
        assert self._out is not None
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


def explain(
    reports: dict[int, Sighting],
    silent: dict[int, Sighting | None],
    timeout_s: float,
    files: str,
) -> str:
    """Which rank the others waited for, where everyone was, and what to do.

    reports: of the ranks that answered.   silent: the others, as they were last seen.
    """
    fewest = min(report.passed for report in reports.values())
    stuck = {r: s for r, s in reports.items() if s.passed == fewest and not s.waits}
    if len(stuck) == len(reports) and (silent or len(reports) > 1):
        stuck = {}  # all are at the same place: that tells nothing
    blamed = sorted([*silent, *stuck])
    step = max(report.step for report in reports.values())
    lines = [
        f"{f'step {step}: ' if step else ''}{_ranks(blamed) if blamed else 'a rank'} did not answer within "
        f"parallel.timeout_s = {timeout_s:g}, so the job was ended"
    ]
    for rank, seen in [*silent.items()][:NUM_LISTED]:
        last = f"{seen} left no report; last seen in {seen.place}" if seen else f"rank {rank}"
        lines.append(f"  {last}: stopped, dead, cut off, or held in native code")
    lines += [f"  {seen}: {seen.place}, at {seen.where}" for seen in [*stuck.values()][:NUM_LISTED]]
    others: dict[str, list[int]] = {}
    for rank, seen in reports.items():
        if rank not in stuck:
            others.setdefault(seen.place, []).append(rank)
    verb = "waiting" if blamed else "waiting for one another, none behind the others"
    lines += [f"  {verb}: {_ranks(ranks)} in {place}" for place, ranks in others.items()]
    return "\n".join([*lines, ADVICE.format(files=files)])


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:NUM_LISTED]))
    more = f" and {len(ranks) - NUM_LISTED} more" if len(ranks) > NUM_LISTED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def _main_thread_place(error: BaseException | None) -> tuple[str, bool]:
    """Innermost frame of the main thread (or of its error), the innermost of our own, and whether it waits for other ranks."""
    if error is not None and error.__traceback__ is not None:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]
    else:
        innermost = sys._current_frames().get(threading.main_thread().ident or 0)
        frames = [frame for frame, _ in traceback.walk_stack(innermost)]
    if not frames:
        return "an unknown place", False
    ours = next((f for f in frames if _module(f).split(".")[0] in OUR_PACKAGES), frames[0])
    where = _place(frames[0])
    if ours is not frames[0]:
        where += f", called from {_place(ours)}"
    return where, error is not None or _module(frames[0]).startswith(WAITING)


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "")


def _place(frame: FrameType) -> str:
    code = frame.f_code
    return f"{'/'.join(Path(code.co_filename).parts[-2:])}:{frame.f_lineno} in {code.co_name}"


def _to_json(sighting: Sighting) -> str:
    return json.dumps(asdict(sighting))


def _from_json(store: Store, key: str) -> Sighting | None:
    return Sighting(**json.loads(store.get(key))) if store.check([key]) else None
