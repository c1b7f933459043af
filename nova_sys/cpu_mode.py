"""Lets Megatron-core run on a machine without CUDA: the only place that stands in for torch.cuda.

Megatron-core names "cuda" literally in its schedules, optimizer and gradient clipping, and asks torch.cuda for streams, events
and random states. On a CPU all of them have an obvious meaning (there is one device and one stream), which is what is given here.
With a GPU present nothing in this file runs. Checked against megatron-core 0.16.1.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _CudaMeansCpu(TorchFunctionMode):
    """Redirects device="cuda" to the CPU, and lets Tensor.type() answer as the distributed optimizer expects."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if kwargs:
            device = kwargs.get("device")
            if device is not None and str(device).startswith("cuda"):
                kwargs = {**kwargs, "device": "cpu"}
            return func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args)


class _OneStream:
    """The CPU's only stream: work is done when the call returns, so there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __enter__(self) -> _OneStream:
        return self

    def __exit__(self, *_: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...


_entered: list[_CudaMeansCpu] = []


def enable_cpu_mode() -> None:
    """Makes Megatron-core run on this process's CPU. Idempotent; a no-op where CUDA is available."""
    if torch.cuda.is_available() or _entered:
        return
    import megatron.core.tensor_parallel.random as mcore_random

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *_, **__: None
    cuda.empty_cache = lambda: None
    cuda.Event = cuda.Stream = _OneStream
    cuda.current_stream = cuda.default_stream = cuda.stream = lambda *_, **__: _OneStream()
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_rng_state, cuda.set_rng_state = get_state, set_state
    cuda.manual_seed = torch.manual_seed
    mcore_random._get_cuda_rng_state, mcore_random._set_cuda_rng_state = get_state, set_state
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self
    mode = _CudaMeansCpu()
    mode.__enter__()  # for the life of the process
    _entered.append(mode)


def use_cpu_threads() -> None:
    """Sets the threads of this process and flushes denormals.

    Softmax tails are denormal numbers; without flushing, one pack of a small model took 10 to 17 s instead of 0.6 s.
    torchrun starts workers with OMP_NUM_THREADS=1 when nothing else is set: share the cores among the local ranks. Another number is
    somebody's choice and stands.
    """
    torch.set_flush_denormal(True)
    if torch.cuda.is_available():
        return
    if os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
