"""A step's time on the GPU by category: every kernel is counted to the range that launched it, or else by its own name."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType

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
    "triton_": "elementwise and reductions",  # torch.compile's
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
    """Name, category and seconds of every kernel, copy and fill that ran.

    The GPU's own timeline says what ran. torch tells which op launched it, but not of what a package launched outside of any op, and
    it may name two launchers for one kernel.
    """
    events = list(events)
    ran = Counter(
        (event.name, event.time_range.elapsed_us()) for event in events if is_kernel(event)
    )
    found = []
    for event in events:
        if not is_kernel(event) and event.kernels:
            within = category_of_range(event)
            for kernel in event.kernels:
                key = (kernel.name, kernel.duration)
                if ran[key] > 0:
                    ran[key] -= 1
                    found.append((kernel.name, within or category_of_kernel(kernel.name), kernel.duration / 1e6))  # fmt: skip
    alone = ran.elements()
    return found + [(name, category_of_kernel(name), us / 1e6) for name, us in alone]


def is_kernel(event: Any) -> bool:
    """Also a copy or a fill; not a span."""
    on_gpu = event.device_type == DeviceType.CUDA and not event.is_user_annotation
    return on_gpu and not event.name.startswith(SPANS)


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
