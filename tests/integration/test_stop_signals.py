"""SIGTERM and SIGINT: the step is finished, a checkpoint saved, and the same command continues as if nothing had been."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest


def check_stopped(run: Any, name: str) -> int:
    """The run was stopped by a signal, and says so. Returns the number of steps done."""
    assert run.wait() == 0, run.text
    assert "Traceback" not in run.text and "error" not in run.text
    line = re.search(rf"stopped by {name} after step (\d+) of 24; checkpoint (\S+);", run.text)
    assert line, run.text
    done = int(line[1])
    assert run.checkpoints()[-1] == Path(line[2]) == run.folder / f"checkpoints/step_{done:08d}"
    assert run.rows()[-1]["step"] == done
    run.assert_tidy()
    return done


def test_stopped_and_continued_bit_for_bit(
    make_run: Callable[..., Any], undisturbed: Callable[[int], Any]
) -> None:
    """In the first epoch and in the second, each time while a checkpoint is being written; once by each signal."""
    run = make_run()
    done = 0
    for number, how in ((signal.SIGTERM, "nova"), (signal.SIGINT, "fork")):
        target = done + 4
        run.start(how=how)
        run.until(lambda: len(run.rows()) >= target)  # noqa: B023
        os.killpg(run.processes[0].pid, number)  # a writer in the background gets it too
        done = check_stopped(run, number.name)
        assert target <= done < 24
    per_epoch = 1 / run.rows()[0]["epoch"]
    assert 4 < per_epoch < 8, "the stops are in different epochs"
    run.finish()
    assert f"step {done} is done" in run.text
    run.assert_same_as(undisturbed(1))


def test_all_ranks_stop_after_the_same_step(make_run: Callable[..., Any]) -> None:
    """First the launcher is told, as by a cluster manager or a terminal; then one rank alone."""
    run = make_run(parallel__tensor=2, checkpoint__every_steps=100)
    run.start(2, "nova")
    run.until(lambda: len(run.rows()) >= 3)
    os.kill(run.processes[0].pid, signal.SIGTERM)
    done = check_stopped(run, "SIGTERM")
    run.start(2)
    run.until(lambda: len(run.rows()) >= done + 3)
    os.kill(run.processes[1].pid, signal.SIGTERM)
    assert done + 3 <= check_stopped(run, "a signal to another rank") < 24
    run.finish(2)
    whole = make_run(parallel__tensor=2, checkpoint__every_steps=0)
    whole.finish(2)
    run.assert_same_as(whole)


def test_a_signal_when_only_some_ranks_have_started(make_run: Callable[..., Any]) -> None:
    """Rank 1 waits for rank 0 to come to the first step: both end alike, none is left to train alone."""
    run = make_run()
    run.first = (
        "import os, time; from nova_sys.trainer import Trainer; train = Trainer.train\n"
        "def late(self):\n"
        "    print('rank', os.environ['RANK'], 'is built', flush=True)\n"
        "    if os.environ['RANK'] == '0':\n"
        "        time.sleep(60)\n"
        "    train(self)\n"
        "Trainer.train = late"
    )
    run.start(2)
    run.until(lambda: run.log.exists() and run.text.count("is built") == 2)
    time.sleep(0.5)
    for process in (run.processes[1], run.processes[0]):
        os.kill(process.pid, signal.SIGTERM)
    run.until(lambda: run.is_over)
    assert [process.poll() for process in run.processes] == [128 + signal.SIGTERM] * 2, run.text
    assert "Traceback" not in run.text, run.text
    assert not run.checkpoints() and not run.rows()


def test_torchrun_passes_the_signal_on(make_run: Callable[..., Any]) -> None:
    """The ranks save and leave; torchrun itself reports every signal as a failure, which is not ours to change."""
    run = make_run(checkpoint__every_steps=0)
    run.start(2, "torchrun")
    run.until(lambda: len(run.rows()) >= 3)
    os.kill(run.processes[0].pid, signal.SIGTERM)
    assert run.wait() != 0
    line = re.search(r"stopped by SIGTERM after step (\d+) of 24", run.text)
    assert line and run.checkpoints()[-1].name == f"step_{int(line[1]):08d}", run.text
    run.assert_tidy()


@pytest.mark.parametrize(("nproc", "how"), [(1, "fork"), (2, "nova")])
def test_signal_before_the_first_step(
    make_run: Callable[..., Any], tmp_path: Path, write_dialogues: Any, nproc: int, how: str
) -> None:
    """Nothing is done yet, so nothing is saved, and the exit code says that the run is not what was asked for."""
    data = write_dialogues(tmp_path / "many.jsonl", 20_000)
    run = make_run(data__train=str(data), data__cache_dir=str(tmp_path / "cache"))
    run.start(nproc, how)
    run.until((run.folder / ".lock").exists)
    os.kill(run.processes[0].pid, signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM, run.text
    assert "SIGTERM: ended before the first step, so nothing was saved" in run.text
    assert "Traceback" not in run.text and "error" not in run.text
    assert not run.checkpoints() and not run.rows()
    assert not [p for p in run.alive() if p.status() != psutil.STATUS_ZOMBIE]
