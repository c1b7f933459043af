"""kill -9 at random moments, also while checkpoints are written: the same command goes on from the last complete one, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from nova_sys.checkpoint_files import refuse_damaged

KINDS = ("one", "all", "writer")


@dataclass(frozen=True)
class Case:
    """nproc: ranks.  writer_kills: at least so many of the kills hit a process that is writing a checkpoint."""

    nproc: int
    asynchronous: bool
    num_kills: int
    steps: int
    writer_kills: int = 0


SLOW = [
    Case(1, True, 10, 60, writer_kills=3),
    Case(1, False, 5, 40),
    Case(2, True, 10, 60, writer_kills=3),
    Case(2, False, 5, 40),
]


def test_killed_runs_continue_bit_for_bit(make_run: Callable[..., Any]) -> None:
    """Three kills, one of them of a writer."""
    happened = kill_again_and_again(make_run, Case(1, True, 3, 24, writer_kills=1))
    assert sum(happened[kind] for kind in KINDS) == 3


@pytest.mark.slow
def test_thirty_kills(make_run: Callable[..., Any]) -> None:
    """Of one rank, of all, and of a writer; some of them leave a torn checkpoint behind."""
    happened = sum((kill_again_and_again(make_run, case) for case in SLOW), Counter())
    assert sum(happened[kind] for kind in KINDS) == 30
    assert all(happened[kind] >= 3 for kind in KINDS), happened
    assert happened["torn"] >= 1, happened


def kill_again_and_again(make_run: Callable[..., Any], case: Case) -> Counter[str]:
    """Counts the kills by kind, and how many of them left a checkpoint half written."""
    rng = random.Random(1000 * case.nproc + 100 * case.asynchronous + case.num_kills)
    changes = {"checkpoint__asynchronous": case.asynchronous, "train__steps": case.steps}
    run, whole = make_run(**changes), make_run(**changes, checkpoint__every_steps=0)
    whole.finish(case.nproc)
    last = f"step_{case.steps:08d}"
    happened: Counter[str] = Counter()
    while (done := sum(happened[kind] for kind in KINDS)) < case.num_kills:
        if [path.name for path in run.checkpoints()][-1:] == [last]:  # too fast for all the kills
            run.finish(case.nproc)
            run.assert_same_as(whole)
            run = make_run(**changes)
        run.start(case.nproc)
        missing = case.writer_kills - happened["writer"]
        kinds = ("writer",) if missing >= case.num_kills - done else KINDS
        kind = kill_one_day(run, rng, case.steps // case.num_kills, rng.choice(kinds))
        happened[kind] += 1
        happened["torn"] += bool([*(run.folder / "checkpoints").glob(".step_*")])
        for checkpoint in run.checkpoints():
            refuse_damaged(checkpoint)  # what has the name is whole
    run.finish(case.nproc)
    run.assert_tidy()
    run.assert_same_as(whole)
    return happened


def kill_one_day(run: Any, rng: random.Random, num_steps: int, whom: str) -> str:
    """Lets the run make some steps, or none, then kills. Returns what: "nothing" when the run was over before."""
    target = len(run.rows()) + rng.randint(1, num_steps)
    began, patience_s = time.monotonic(), rng.uniform(0.0, 2.0) if rng.random() < 0.3 else 600.0
    run.until(lambda: len(run.rows()) >= target or time.monotonic() - began > patience_s)
    ranks = [process.pid for process in run.processes]
    if whom == "writer":
        writers: list[int] = []
        run.until(lambda: writers.extend(writers_of(run)) or writers)
        whom = kill_writer(run, rng.choice(writers)) if writers else "nothing"
        if whom == "nothing" and not run.is_over:
            whom = "all"
    else:
        time.sleep(rng.uniform(0.0, 0.05))
        if run.is_over:
            whom = "nothing"
        elif whom == "one":
            kill(rng.choice(ranks))
            time.sleep(rng.uniform(0.0, 0.2))
    for pid in ranks:  # as a launcher does with the ranks that are left
        kill(pid)
    run.until(lambda: run.is_over)
    assert_gone(run)
    return whom


def writers_of(run: Any) -> list[int]:
    """Processes that the ranks have forked. They live for some milliseconds, in which a look at all processes would come too late."""
    found = []
    for pid in (process.pid for process in run.processes):
        with suppress(OSError):
            found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return found


def kill_writer(run: Any, writer: int) -> str:
    """The run says that this save failed, and ends; unless the writer had done its work already."""
    kill(writer)
    target = len(run.rows()) + 3
    run.until(lambda: len(run.rows()) >= target)
    if not run.is_over or run.wait() == 0:
        return "nothing"
    assert run.wait() == 2 and "could not be saved" in run.text, run.text
    return "writer"


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def assert_gone(run: Any) -> None:
    """Soon after its ranks no process of the run is there that could write into the next one's files."""
    began = time.monotonic()
    while left := [p for p in run.alive() if p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() - began < 30, left
        time.sleep(0.01)
