"""Signals as requests: noted by the loop, told at once, and final when they come again or nothing happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from nova_sys.forked import ForkedCall
from nova_sys.stopping import stop_signals

PROGRAM = """
import ctypes, logging, os, signal, sys, threading, time
from nova_sys import stopping
from nova_sys.log import setup_logging

stopping.ONE_SIGNAL_S, stopping.UNWIND_S = 2.0, 1.0
setup_logging()

def held():  # in native code, where Python runs no handler
    reads, writes = os.pipe()
    ctypes.CDLL(None).read(reads, ctypes.create_string_buffer(1), 1)

with stopping.stop_signals() as stop:
    if "training" in sys.argv:
        stop.start_training()
    print("ready", flush=True)
    if "held" in sys.argv:
        held()
    while not stop.is_set:
        time.sleep(0.01)
    print(f"noted {stop.reason}", flush=True)
    if "loops" in sys.argv:
        time.sleep(60)
"""


@contextmanager
def program(*words: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *words]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_training_is_noted(number: signal.Signals) -> None:
    with program("training") as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, f"noted {number.name}\n")
    assert f"{number.name}: finishing this step, then a checkpoint" in err


@pytest.mark.parametrize("words", [("loops",), ("held",)])
def test_a_second_signal_ends_the_process(words: tuple[str, ...]) -> None:
    """Also where the main thread is in native code; the first two count as one."""
    with program("training", *words) as process:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        time.sleep(3.5)  # longer than signals count as one
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM


@pytest.mark.parametrize("words", [(), ("held",)])
def test_a_signal_before_training_ends_the_process(words: tuple[str, ...]) -> None:
    with program(*words) as process:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "SIGINT: ended before the first step, so nothing was saved" in err
    assert "Traceback" not in err


def test_a_signal_while_the_ranks_meet() -> None:
    """Between the first rank's arrival and the last one's, a signal to some of them ends all, without an error."""

    def meet(others: Any) -> int:
        with stop_signals() as stop:

            def on_any_rank(stops: bool) -> bool:
                os.kill(os.getpid(), signal.SIGTERM)
                while not stop.is_set:
                    time.sleep(0.01)
                return others(stops)

            with pytest.raises(SystemExit) as ended:
                stop.start_training(on_any_rank)
        return ended.value.code  # pyright: ignore[reportReturnType]

    def gone(stops: bool) -> bool:
        raise RuntimeError("Connection closed by peer")

    assert meet(lambda stops: True) == 128 + signal.SIGTERM
    assert meet(gone) == 128 + signal.SIGTERM
    with stop_signals() as stop, pytest.raises(RuntimeError, match="Connection closed"):
        stop.start_training(gone)
    with stop_signals() as stop, pytest.raises(SystemExit) as ended:
        stop.start_training(lambda stops: True)  # another rank's signal
    assert ended.value.code == 128 + signal.SIGTERM


def test_other_signals_are_others_business() -> None:
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with stop_signals() as stop:
            stop.start_training()
            os.kill(os.getpid(), signal.SIGUSR1)
            while not seen:
                time.sleep(0.01)
            time.sleep(0.2)
            assert not stop.is_set
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_signals():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_forked_call_finishes_and_its_signals_are_its_own() -> None:
    def work() -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return "x" * 1_000_000  # more than a pipe holds

    with stop_signals() as stop:
        stop.start_training()
        assert ForkedCall(work).result() == "x" * 1_000_000
        assert not stop.is_set


def test_what_a_forked_call_raises_is_raised_here() -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(OSError, match="No space left") as caught:
        ForkedCall(fail).result()
    assert caught.value.errno == 28
    with pytest.raises(ChildProcessError, match="exit code -9; is the machine out of memory"):
        ForkedCall(die).result()


def test_a_forked_call_dies_with_its_parent() -> None:
    code = (
        "import os, time\nfrom nova_sys.forked import ForkedCall\n"
        "call = ForkedCall(lambda: time.sleep(60))\n"
        "print(call._process.pid, flush=True)\nos.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120)
    child = int(done.stdout)
    began = time.monotonic()
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - began < 30, "the forked process is still there"
        time.sleep(0.02)
