"""Traces of chosen steps, and the names that appear in them.

Ranges: `nova.<phase>` for every phase that the watchdog is told of (data, forward and backward, optimizer, metrics, save), and inside
them `nova.pack to device`, `nova.loss`, what `MegatronRanges` names, and the ops of nova_kernels with their backward passes.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from nova_kernels.ranges import profiler_range

if TYPE_CHECKING:
    from torch.autograd.profiler import emit_nvtx
    from torch.profiler import ProfilerAction, profile

logger = logging.getLogger(__name__)


class MegatronRanges:
    """Takes the place of Megatron's timers, which stand around each forward, backward, message between stages, gradient reduction
    and part of the optimizer: `nova.forward-compute`, `nova.all-grads-sync`, ... They open and close like brackets."""

    def __init__(self) -> None:
        self._name = ""
        self._open: list[AbstractContextManager[object]] = []

    def __call__(self, name: str, log_level: int = 0) -> MegatronRanges:
        self._name = name
        return self

    def start(self, barrier: bool = False) -> None:
        """Without the barrier that a clock would want: it would change what is looked at."""
        opened = profiler_range(f"nova.{self._name}")
        opened.__enter__()
        self._open.append(opened)

    def stop(self, barrier: bool = False) -> None:
        self._open.pop().__exit__(None, None, None)


class Profiler:
    """Records steps (first, last): into a trace that TensorBoard's profile plugin opens or, under nsys, as NVTX ranges in what
    `--capture-range=cudaProfilerApi` captures (nsys and torch.profiler cannot both have CUPTI).

    Call `step(step)` at the end of every step, and `close()` at the end of the run. With None, or
    with steps that are already done, nothing happens.
    """

    def __init__(
        self, run_dir: Path, steps: tuple[int, int] | None, *, start_step: int = 0, rank: int = 0
    ) -> None:
        self._profile: profile | _NvtxCapture | None = None
        if steps is None or steps[1] <= start_step:
            return
        import torch.profiler

        self._first, self._last = max(steps[0], start_step + 1), steps[1]
        self._start_step = start_step
        if os.environ.get("NSYS_PROFILING_SESSION_ID") and torch.cuda.is_available():
            self._profile = _NvtxCapture(self._first - 1 - start_step)
            logger.info("nsys runs: steps %d to %d get NVTX ranges", self._first, self._last)
        else:
            self._profile = self._trace(run_dir / "tensorboard", rank)
        self._profile.start()

    def _trace(self, folder: Path, rank: int) -> profile:
        from torch.profiler import profile, tensorboard_trace_handler

        write = tensorboard_trace_handler(str(folder), worker_name=f"rank{rank}")

        def on_trace_ready(finished: profile) -> None:
            write(finished)
            logger.info("profiled steps %d to %d into %s", self._first, self._last, folder)

        return profile(schedule=self._action, on_trace_ready=on_trace_ready, record_shapes=True)

    def step(self, step: int) -> None:
        """Says that the (1-based) step is over."""
        if self._profile:
            self._profile.step()
            if step >= self._last:
                self.close()

    def close(self) -> None:
        """Writes a trace that is still being recorded."""
        if self._profile:
            self._profile.stop()
            self._profile = None

    def _action(self, num_done: int) -> ProfilerAction:
        from torch.profiler import ProfilerAction

        step = self._start_step + num_done + 1
        if step == self._last:
            return ProfilerAction.RECORD_AND_SAVE
        if self._first <= step < self._last:
            return ProfilerAction.RECORD
        return ProfilerAction.WARMUP if step == self._first - 1 else ProfilerAction.NONE


class _NvtxCapture:
    """Lets nsys capture from the end of the step that is `wait` steps away (0: from the start) until `stop`."""

    def __init__(self, wait: int) -> None:
        self._wait = wait
        self._ranges: emit_nvtx | None = None

    def start(self) -> None:
        import torch

        if self._wait == 0:
            torch.cuda.profiler.start()
            self._ranges = torch.autograd.profiler.emit_nvtx()
            self._ranges.__enter__()

    def step(self) -> None:
        self._wait -= 1
        self.start()

    def stop(self) -> None:
        import torch

        if self._ranges is not None:
            self._ranges.__exit__(None, None, None)
            torch.cuda.profiler.stop()
