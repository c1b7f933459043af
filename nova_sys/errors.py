"""How a process ends: a user's mistake with red lines and exit code 2, a fault with a traceback."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from opcode import opmap
from typing import NoReturn

from nova_sys.log import console, current_rank

USER_ERROR_EXIT_CODE = 2
HANG_EXIT_CODE = 3  # a rank stopped answering; see watchdog.py
OUR_PACKAGES = ("nova_sys", "__main__")
BACKEND_CHOICE = "nova_kernels.backend"  # refuses what train.kernels asks of an op that lacks it
LAUNCHED = "NOVA_LAUNCHED"  # set for workers of `launcher.launch`, which prints their errors once
IN_A_JOB = {LAUNCHED, "TORCHELASTIC_RUN_ID"}  # ours, or torchrun's
PR_SET_PDEATHSIG = 1


class ToldStop(RuntimeError):
    """The run must not go on, through no mistake that was seen in its input; the message says why, and what to look at."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """The body of a rank's, or a command's, main.

    A user's mistake is printed by rank 0 (or by `launcher.launch`, for its workers) and ends the
    process with exit code 2; with NOVA_DEBUG=1 it keeps its traceback. Every other error passes.
    The elastic launcher finds either in the rank's error file. A worker does not outlive `launch`.
    """
    if not IN_A_JOB.isdisjoint(os.environ):
        die_with_parent()
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        _tell_launcher(error)
        if debugging() or not is_user_error(error):
            raise
        if current_rank() == 0 and LAUNCHED not in os.environ:
            show_error(str(error))
        sys.exit(USER_ERROR_EXIT_CODE)


def debugging() -> bool:
    """True when tracebacks are wanted for every error: NOVA_DEBUG=1, or `nova --debug`."""
    return os.environ.get("NOVA_DEBUG", "0") not in ("", "0")


def is_user_error(error: BaseException) -> bool:
    """A ValueError, a ToldStop, or a FloatingPointError (a step that is not finite) that a `raise` in our own code raised.

    One from the depths of torch or numpy is a fault, and so is one from a built-in that our code called: int("x").
    """
    trace = error.__traceback__
    if not isinstance(error, (ValueError, ToldStop, FloatingPointError)) or trace is None:
        return False
    while trace.tb_next:
        trace = trace.tb_next
    if trace.tb_frame.f_code.co_code[trace.tb_lasti] != opmap["RAISE_VARARGS"]:
        return False  # the instruction that failed here called something without a frame of its own
    module = trace.tb_frame.f_globals.get("__name__", "")
    return module.split(".")[0] in OUR_PACKAGES or module == BACKEND_CHOICE


def show_error(message: str) -> None:
    console().print(f"error: {message}", style="red", soft_wrap=True, markup=False, highlight=False)


def end_at_once(message: str, exit_code: int, *, speaks: bool) -> NoReturn:
    """Ends this process from any thread, without waiting for the main one, which may never come back.

    speaks: this rank prints the message (unless `launcher.launch` does, which finds it in the rank's error file).
    """
    _tell_launcher(RuntimeError(message))
    if speaks and LAUNCHED not in os.environ:
        show_error(message)
    for child in active_children():  # they would outlive us
        child.kill()
    os._exit(exit_code)


def _tell_launcher(error: Exception) -> None:
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)


def die_with_parent(parent: int | None = None) -> None:
    """Linux kills this process when its parent is killed: nobody is left to wait, or to write into the next run's files.

    parent: its process id, where this process may have lost it already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)
