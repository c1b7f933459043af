"""kill -9 at random moments, also while checkpoints are written: the same command goes on from the last complete one, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import pytest

from nova_sys.checkpoint_files import refuse_damaged


@pytest.mark.parametrize(
    ("nproc", "asynchronous", "num_kills", "steps"),
    [
        (1, True, 3, 24),
        pytest.param(1, True, 10, 60, marks=pytest.mark.slow),
        pytest.param(1, False, 5, 40, marks=pytest.mark.slow),
        pytest.param(2, True, 10, 60, marks=pytest.mark.slow),
        pytest.param(2, False, 5, 40, marks=pytest.mark.slow),
    ],
)
def test_killed_runs_continue_bit_for_bit(
    make_run: Callable[..., Any], nproc: int, asynchronous: bool, num_kills: int, steps: int
) -> None:
    """The slow cases together kill thirty times."""
    rng = random.Random(1000 * nproc + 100 * asynchronous + num_kills)
    changes = {"checkpoint__asynchronous": asynchronous, "train__steps": steps}
    run, whole = make_run(**changes), make_run(**changes, checkpoint__every_steps=0)
    whole.finish(nproc)
    last = f"step_{steps:08d}"
    for _ in range(num_kills):
        if [path.name for path in run.checkpoints()][-1:] == [last]:  # too fast for all the kills
            run.assert_same_as(whole)
            run = make_run(**changes)
        run.start(nproc)
        kill_one_day(run, rng, steps // num_kills)
        for checkpoint in run.checkpoints():
            refuse_damaged(checkpoint)  # what has the name is whole
    run.finish(nproc)
    run.assert_tidy()
    run.assert_same_as(whole)


def kill_one_day(run: Any, rng: random.Random, num_steps: int) -> None:
    """Lets the run make some steps, or none, then kills."""
    target = len(run.rows()) + rng.randint(1, num_steps)
    began, patience_s = time.monotonic(), rng.uniform(0.0, 2.0) if rng.random() < 0.3 else 600.0
    run.until(lambda: len(run.rows()) >= target or time.monotonic() - began > patience_s)
    time.sleep(rng.uniform(0.0, 0.05))
    ranks = [process.pid for process in run.processes]
    writers = [p for p in run.alive() if p.pid not in ranks]
    whom = rng.choice(("one", "one", "all", "writer"))
    if whom == "writer" and writers:
        kill_writer(run, writers[0])
    elif whom != "all":
        kill(rng.choice(ranks))
        time.sleep(rng.uniform(0.0, 0.2))
    for pid in ranks:  # as a launcher does with the ranks that are left
        kill(pid)
    run.until(lambda: run.is_over)
    assert_gone(run)


def kill_writer(run: Any, writer: psutil.Process) -> None:
    """The run says that this save failed, and ends; unless the writer had done its work already."""
    kill(writer.pid)
    target = len(run.rows()) + 3
    run.until(lambda: len(run.rows()) >= target)
    if run.is_over:
        assert run.wait() in (0, 2), run.text
        assert run.wait() == 0 or "could not be saved" in run.text, run.text


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def assert_gone(run: Any) -> None:
    """Soon after its ranks no process of the run is there that could write into the next one's files."""
    began = time.monotonic()
    while left := [p for p in run.alive() if p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() - began < 30, left
        time.sleep(0.01)
