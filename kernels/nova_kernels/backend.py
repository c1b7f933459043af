"""Which implementation of an op runs: chosen once, and said aloud."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from types import ModuleType

import torch

_log = logging.getLogger(__name__)
_announced: set[tuple[str, str]] = set()


def resolve(op: str, requested: str, available: Sequence[str], *, why: str = "") -> str:
    """The backend that runs `op`; an explicit request is never replaced by another backend.

    Args:     op: the public function's name, for messages. requested: "auto" or a backend's name.
              available: the backends that can run here and now, the preferred one first.
              why: the rule that the inputs break for the backends left out, for the message.
    Returns:  the backend's name; each (op, backend) pair is logged once per process.
    Raises:   ValueError when the requested backend is not available here.
    """
    if requested == "auto" and available:
        chosen = available[0]
    elif requested in available:
        chosen = requested
    else:
        here = ", ".join(available) or "none"
        raise ValueError(
            f"{op}: backend={requested!r} cannot run here; available for these inputs: {here}. "
            f"{why + '. ' if why else ''}"
            f'Use backend="auto", or one of the available names.'
        )
    if (op, chosen) not in _announced:
        _announced.add((op, chosen))
        _log.info("%s -> %s", op, chosen)
    return chosen


def triton_runs_on(device: torch.device) -> bool:
    """True on a CUDA device, and on a CPU in Triton's interpreter (TRITON_INTERPRET=1), where Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return False
    return device.type == "cuda" or (
        device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") == "1"
    )


def cuda_kernels() -> ModuleType | None:
    """The CUDA extension; None where it was built without a CUDA compiler."""
    try:
        from nova_kernels import _C_cuda
    except ImportError:
        return None
    return _C_cuda


def cuda_runs_on(device: torch.device) -> bool:
    """True on a Hopper GPU, where the CUDA extension is built: its instructions exist on sm_90 only."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) == (9, 0)
        and cuda_kernels() is not None
    )
