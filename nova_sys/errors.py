"""How a process ends: a user's mistake with red lines and exit code 2, a fault with a traceback."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from nova_sys.log import console, current_rank

USER_ERROR_EXIT_CODE = 2
OUR_PACKAGES = ("nova_sys", "__main__")
LAUNCHED = "NOVA_LAUNCHED"  # set for workers of `launcher.launch`, which prints their errors once
PR_SET_PDEATHSIG = 1


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """The body of a rank's, or a command's, main.

    A user's mistake is printed by rank 0 (or by `launcher.launch`, for its workers) and ends the
    process with exit code 2; with NOVA_DEBUG=1 it keeps its traceback. Every other error passes.
    The elastic launcher finds either in the rank's error file. A worker does not outlive `launch`.
    """
    if LAUNCHED in os.environ:
        _die_with_parent()
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
    """A ValueError that our own code raised; one from the depths of torch or numpy is a fault."""
    trace = error.__traceback__
    if not isinstance(error, ValueError) or trace is None:
        return False
    while trace.tb_next:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").split(".")[0] in OUR_PACKAGES


def show_error(message: str) -> None:
    console().print(f"error: {message}", style="red", soft_wrap=True, markup=False, highlight=False)


def _tell_launcher(error: Exception) -> None:
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)


def _die_with_parent() -> None:
    """Linux ends this process when its launcher is killed: no rank is left waiting for others."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
