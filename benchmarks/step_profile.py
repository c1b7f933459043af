"""Where the time of our step goes, by torch.profiler: self time of every operation, counted to the part of the step that called it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from nova_sys.trainer import Trainer

WARMUP_STEPS = 2
PARTS = {  # what an event, or one that encloses it, is called -> the part of the step; the innermost match counts
    "LinearWithGradAccumulation": "linear layers",
    "BlockedAttention": "attention",
    "ShiftRope": "rotary positions",
    "LinearLogprob": "output layer and log-softmax",
    "rms_norm": "norms",
    "RMSNorm": "norms",
    "AccumulateGrad": "gradient buffers",
    "step: gradients": "gradient buffers",
    "step: optimizer": "optimizer",
    "step: data": "data",
}
REST = "SwiGLU, residuals, embedding, loss, metrics"
BETWEEN = "Python between operations"


def profile_steps(trainer: Trainer, num_steps: int) -> dict[str, Any]:
    """Seconds per step by part, of `num_steps` steps behind a warm-up; `seconds_unprofiled` tells what watching costs."""
    _scope(trainer.loader, "next", "step: data")
    _scope(trainer.optimizer, "step", "step: optimizer")
    for chunk in trainer.ddp:
        for method in ("zero_grad_buffer", "finish_grad_sync", "start_param_sync"):
            _scope(chunk, method, "step: gradients")
    trainer.loader.start(0)
    try:
        steps = iter(range(WARMUP_STEPS + 2 * num_steps))
        _seconds(trainer, steps, WARMUP_STEPS)
        unprofiled_s = _seconds(trainer, steps, num_steps)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            profiled_s = _seconds(trainer, steps, num_steps)
    finally:
        trainer.loader.stop()
    parts = _by_part(profiler.events())
    parts[BETWEEN] = profiled_s - sum(parts.values())
    return {
        "steps": num_steps,
        "seconds_per_step": {name: s / num_steps for name, s in sorted(parts.items())},
        "seconds_profiled": profiled_s / num_steps,
        "seconds_unprofiled": unprofiled_s / num_steps,
    }


def _scope(owner: Any, method: str, name: str) -> None:
    """Names the time of a method for the profiler."""
    inner: Callable[..., Any] = getattr(owner, method)

    @wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return inner(*args, **kwargs)

    setattr(owner, method, outer)


def _seconds(trainer: Trainer, steps: Any, num_steps: int) -> float:
    began_s = time.perf_counter()
    for _ in range(num_steps):
        trainer._one_step(next(steps))
    return time.perf_counter() - began_s


def _by_part(events: Any) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        part = _part_of(event)
        if part != REST or event.name.startswith(
            ("aten::", "autograd::")
        ):  # else: our own scope's Python
            seconds[part] += event.self_cpu_time_total / 1e6
    return seconds


def _part_of(event: Any) -> str:
    while event is not None:
        for called, part in PARTS.items():
            if called in event.name:
                return part
        event = event.cpu_parent
    return REST
