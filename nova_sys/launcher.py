"""Starts a module on N processes of this machine with torch's elastic launcher.

`nova train R --nproc N` comes here; on many machines `torchrun ... -m nova_sys.train R` does this.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from nova_sys.errors import (
    HANG_EXIT_CODE,
    LAUNCHED,
    USER_ERROR_EXIT_CODE,
    debugging,
    show_error,
)
from nova_sys.stopping import ONE_SIGNAL_S

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

EXPLAINED = (USER_ERROR_EXIT_CODE, HANG_EXIT_CODE)
"""Exit codes of ranks that left a message which needs no addition."""


def launch(module: str, argv: Sequence[str], nproc: int) -> int:
    """Runs `python -m module argv...` on `nproc` local processes; returns the job's exit code.

    With nproc = 1 the module's `main(argv)` runs in this process, which starts faster; its faults
    are raised here. With more, its `if __name__ == "__main__":` runs in each worker, with main's
    body inside `exit_on_user_error`; the exit code is that of the worker that failed first (128 +
    signal for a killed one), and what went wrong there is printed once. SIGINT and SIGTERM reach
    every worker, which ends as it sees fit; a second one ends the job at once.
    """
    if nproc < 1:
        raise ValueError(f"nproc = {nproc}: must be 1 or more; it is the number of processes")
    if nproc == 1:
        return _run_here(module, argv)
    with _environment({**_resources(nproc), LAUNCHED: "1"}):
        return _launch_elastic(module, argv, nproc)


def _run_here(module: str, argv: Sequence[str]) -> int:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    with _environment({**_resources(1), **alone, **address}):
        try:
            return importlib.import_module(module).main(list(argv)) or 0
        except SystemExit as stop:  # exit_on_user_error, or argparse
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _launch_elastic(module: str, argv: Sequence[str], nproc: int) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if not debugging():
        _quiet_elastic()
    with tempfile.TemporaryDirectory(prefix="nova_") as folder, _signals_passed_on() as passed_on:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=f"nova_{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # a free port
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(
                log_dir=folder
            ),  # for error files; output is not redirected
            signals_to_handle="SIGHUP,SIGQUIT",  # on others the agent gives up on its workers
        )
        try:
            elastic_launch(config, sys.executable)("-m", module, *argv)
        except ChildFailedError as error:
            codes = {failure.exitcode for failure in error.failures.values()}
            ended = {
                code for number in (*passed_on, signal.SIGKILL) for code in (-number, 128 + number)
            }
            return 128 + passed_on[0] if passed_on and codes <= ended else _report_failure(error)
        except SignalException as error:
            return 128 + error.sigval
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def _report_failure(error: ChildFailedError) -> int:
    """Prints what the first failing worker said; returns its exit code.

    What a worker explained comes before the broken connections it causes in the others.
    """
    rank, failure = min(
        error.failures.items(),
        key=lambda item: (item[1].exitcode not in EXPLAINED, item[1].timestamp),
    )
    message = failure.message
    text = str(message.get("message", "")) if isinstance(message, dict) else ""
    if failure.exitcode in EXPLAINED and text:
        show_error(text.partition(": ")[2])  # without the exception's name
        return failure.exitcode
    if failure.exitcode < 0:
        name = failure.signal_name()
        remedy = "; is the machine out of memory?" if name == "SIGKILL" else ""
        show_error(f"rank {rank} was ended by {name}{remedy}")
        return 128 - failure.exitcode
    show_error(f"rank {rank} failed first, with exit code {failure.exitcode}. {text}".rstrip())
    return failure.exitcode


def _quiet_elastic() -> None:
    """The agent's own reports (its traceback, a table of ranks) would bury the message."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _resources(nproc: int) -> dict[str, str]:
    counted = hasattr(os, "sched_getaffinity")  # respects taskset and a container's cpuset
    cores = len(os.sched_getaffinity(0)) if counted else os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": str(max(1, cores // nproc)),  # torchrun's default is 1
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron orders collectives before GEMMs by it
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _environment(defaults: dict[str, str]) -> Iterator[None]:
    """Environment variables for the job, where the user has not set them; gone again afterwards."""
    ours = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextmanager
def _signals_passed_on() -> Iterator[list[signal.Signals]]:
    """SIGINT and SIGTERM go to the workers, and into the list; a second one, after a while, kills the workers.

    The elastic agent takes over other ending signals for good; the caller gets them back here.
    """
    received: list[signal.Signals] = []
    first_s = 0.0
    others = set(psutil.Process().children())

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal first_s
        first_s = first_s or time.monotonic()
        received.append(signal.Signals(number))
        workers = set(psutil.Process().children()) - others
        if not workers:  # none was started yet
            sys.exit(128 + number)
        again = time.monotonic() - first_s > ONE_SIGNAL_S
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(signal.SIGKILL if again else number)

    ours, agents = (signal.SIGINT, signal.SIGTERM), (signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in (*ours, *agents)}
    for number in ours:
        signal.signal(number, pass_on)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
