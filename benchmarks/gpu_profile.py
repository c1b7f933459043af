"""A step's time on the GPU by category: every kernel is counted to the range that launched it, or else by its own name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

RANGES = {  # part of the name of an op, or of a range around it -> category; the innermost match counts
    "linear_logprob": "output layer and loss",
    "LinearLogprob": "output layer and loss",
    "linear_dpo": "output layer and loss",
    "nova.loss": "output layer and loss",
    "packed_attention": "attention",
    "PackedAttention": "attention",
    "BlockedAttention": "attention",
    "kv_shift_rope": "rotary positions and KV shift",
    "ShiftRope": "rotary positions and KV shift",
    "Optimizer.step": "optimizer",
    "nova.optimizer": "optimizer",
}
KERNELS = {  # part of a kernel's name -> category; the first match counts
    "nccl": "communication",
    "multi_tensor": "optimizer",
    "adam": "optimizer",
    "fold_kernel": "output layer and loss",
    "dlogits": "output layer and loss",
    "sum_rows": "output layer and loss",
    "inverse_norm": "output layer and loss",
    "project_kernel": "output layer and loss",
    "shift_rope": "rotary positions and KV shift",
    "unmix": "rotary positions and KV shift",
    "attention": "attention",
    "flash": "attention",
    "fmha": "attention",
    "dq_kernel": "attention",
    "dkv_kernel": "attention",
    "fwd_kernel": "attention",
    "quantize": "casts to FP8",
    "cast_transpose": "casts to FP8",
    "transpose_amax": "casts to FP8",
    "norm": "norms",
    "gemm": "linear layers",
    "nvjet": "linear layers",
    "cutlass": "linear layers",
    "xmma": "linear layers",
    "memcpy": "copies and fills",
    "memset": "copies and fills",
    "elementwise": "elementwise and reductions",
    "reduce": "elementwise and reductions",
    "cat": "elementwise and reductions",
    "index": "elementwise and reductions",
    "embedding": "elementwise and reductions",
}
REST = "other"
SPANS = ("nova", "ProfilerStep", "Optimizer.", "autograd::")
"""How names begin that the profiler repeats on the GPU's timeline for a range: a span of kernels, and none itself."""


def category_of_kernel(name: str) -> str:
    lowered = name.lower()
    return next((category for part, category in KERNELS.items() if part in lowered), REST)


def category_of_range(event: Any) -> str | None:
    """event: what the CPU was doing when it launched the kernel, with all that encloses it."""
    while event is not None:
        for part, category in RANGES.items():
            if part in event.name:
                return category
        event = event.cpu_parent
    return None


def kernels_of(events: Iterable[Any]) -> list[tuple[str, str, float]]:
    """Name, category and seconds of every kernel, copy and fill that was launched."""
    return [
        (kernel.name, within or category_of_kernel(kernel.name), kernel.duration / 1e6)
        for event in events
        if getattr(event, "kernels", ())
        for within in (category_of_range(event),)
        for kernel in event.kernels
        if not kernel.name.startswith(SPANS)
    ]


def kernel_seconds(kernels: Iterable[tuple[str, str, float]]) -> dict[str, float]:
    """Seconds on the GPU by category, most first."""
    seconds: dict[str, float] = defaultdict(float)
    for _, category, duration_s in kernels:
        seconds[category] += duration_s
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def slowest_kernels(
    kernels: Iterable[tuple[str, str, float]], count: int = 25
) -> list[dict[str, Any]]:
    """The kernels that take longest together, with their launches."""
    total: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name, category, duration_s in kernels:
        total[name[:120], category].append(duration_s)
    longest = sorted(total.items(), key=lambda item: -sum(item[1]))[:count]
    return [
        {"name": name, "category": category, "launches": len(times), "seconds": sum(times)}
        for (name, category), times in longest
    ]
