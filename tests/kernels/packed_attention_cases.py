"""What the CPU and GPU tests of packed_attention's CUDA kernels share: packs, exact results, tolerances."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from nova_kernels.packed_attention.reference import blocked_attention
from nova_kernels.segments import validate_segments
from nova_kernels.testing import random_segments, seeded_normal, segment_table

NAMES = ("out", "lse", "dq", "dk", "dv")
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

WORST, MEAN = 0.05, 0.005
"""Largest error of an element, and root mean square, in units of the values' root mean square."""
TABLES = {
    "branches": lambda: segment_table([(70, [5, 90, 1]), (0, [30, 1]), (40, [20, 17])], 13),
    "tile edges": lambda: segment_table([(127, [1, 128]), (0, [129]), (128, [127, 64])], 65),
    "one segment": lambda: segment_table([], 1200),
    "tiny": lambda: segment_table([(2, [1, 3, 1]), (0, [1, 2]), (5, [4])] * 6, 3),
    "one token": lambda: segment_table([], 1),
    "long prefix": lambda: segment_table([(300, [1, 70, 130, 2])], 9),
    "random 0": lambda: random_segments(
        np.random.default_rng(0), 420, max_prefix=150, max_response=90
    ),
    "random 1": lambda: random_segments(
        np.random.default_rng(1), 330, max_prefix=30, max_response=140
    ),
}


def padding_of(segments: torch.Tensor) -> int:
    """Tokens of the last segment, if it is a trunk and others stand before it."""
    start, end, prefix_start, prefix_end = segments[-1].tolist()
    return end - start if len(segments) > 1 and prefix_start == prefix_end else 0


def inputs(
    segments: torch.Tensor, N: int, K: int, H: int, device: str = "cpu"
) -> list[torch.Tensor]:
    """q, k, v and an upstream gradient in bf16; the padding is NaN."""
    T, padding = int(segments[-1, 1]), padding_of(segments)
    shapes = ((T, N, H), (T, K, H), (T, K, H), (T, N, H))
    args = [seeded_normal(*s, seed=i, dtype=torch.bfloat16) for i, s in enumerate(shapes)]
    for x in args:
        x[T - padding :] = float("nan")
    return [x.to(device) for x in args]


def run(attention: Attention, args: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """[out, lse, dq, dk, dv]."""
    q, k, v = (x.detach().requires_grad_() for x in args[:3])
    out, lse = attention(q, k, v)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), args[3])]


def exact(
    segments: torch.Tensor, args: Sequence[torch.Tensor], *, softmax_scale: float
) -> list[torch.Tensor]:
    """In fp64, of the reference, which other tests hold against the dense mask."""
    rows = validate_segments(segments.cpu(), int(segments[-1, 1]))

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        out, lse = blocked_attention(q, k, v, rows, softmax_scale=softmax_scale, return_lse=True)
        assert lse is not None
        return out, lse

    return run(attention, [x.double() for x in args])


def assert_matches(
    got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], segments: torch.Tensor
) -> None:
    """Every row (token, head) on its own: bf16 rounds P, dS and the result, 2^-9 each."""
    tokens = int(segments[-1, 1]) - padding_of(segments)
    for name, ours, wide in zip(NAMES, got, expected, strict=True):
        ours, wide = ours[:tokens].double(), wide[:tokens]
        error = (ours - wide).abs()
        assert error.isfinite().all(), f"{name}: not finite"
        if name == "lse":
            assert float(error.max()) < 1e-4, f"{name}: {float(error.max())}"
            continue
        whole = (
            wide.square().mean().sqrt().clamp_min(1e-3)
        )  # a row whose terms cancel errs as much as the others
        row = wide.square().mean(-1, keepdim=True).sqrt() + whole
        worst = float((error / row).max())
        mean = float((ours - wide).square().mean().sqrt() / whole)
        assert worst < WORST and mean < MEAN, f"{name}: worst {worst:.4f}, mean {mean:.4f}"
