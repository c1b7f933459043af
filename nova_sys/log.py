"""Logging of a job with many ranks: rank 0 tells the story, the others speak up on trouble.

Only the standard library is imported at the top, so that `quiet_third_party` can run before
Megatron-core is imported.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Megatron-core 0.16 warns at import about optional packages, and uses torch functions that 2.13
# deprecates; neither is news to a user. (start of the message, module that warns)
KNOWN_WARNINGS = [
    ("Transformer Engine and Apex are not installed", r"megatron\.core"),
    ("Apex is not installed", r"megatron\.core"),
    ("full scope is deprecated", r"megatron\.core"),
    ("`load_state_dict` is deprecated", r"megatron\.core"),
    (r"`torch\.distributed\.\w+` is deprecated", r"torch\.distributed"),
    ("Please use DTensor instead and we are deprecating ShardedTensor", ""),
    # Megatron asks for .grad of the distributed optimizer's views; seen through the CPU stand-ins
    (r"The \.grad attribute of a Tensor that is not a leaf", r"nova_sys\.cpu_mode"),
]

CHATTY_LOGGERS = ["megatron.core.rerun_state_machine"]  # warn about their own start-up
STYLES = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "bold red"}


def quiet_third_party() -> None:
    """Silences what is known, for good. What the import warnings meant, the optimizer tells."""
    for message, module in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message, module=module)
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def current_rank() -> int:
    """The rank the launcher gave this process; 0 outside a job."""
    return int(os.environ.get("RANK", "0"))


@functools.cache
def console() -> Console:
    """The one console of this process (stderr): lines that go through it pass above a bar."""
    from rich.console import Console

    return Console(stderr=True)


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        console().print(
            self.format(record).rstrip(),
            style=STYLES.get(record.levelno),
            soft_wrap=True,  # a log file wants one line per message
            markup=False,
            highlight=False,
        )


def setup_logging(rank: int | None = None) -> None:
    """Messages of `nova_sys` from INFO on rank 0; elsewhere from WARNING, with the rank in front.

    Other packages, and Python's warnings, are heard from WARNING on rank 0, from ERROR elsewhere.
    A second call replaces the first.
    """
    rank = current_rank() if rank is None else rank
    quiet_third_party()
    logging.captureWarnings(True)
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, _ConsoleHandler)]:
        root.removeHandler(old)
    handler = _ConsoleHandler()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    for package in ("nova_sys", "nova_kernels", "__main__"):  # __main__: python -m nova_sys.train
        logging.getLogger(package).setLevel(logging.INFO if rank == 0 else logging.WARNING)
