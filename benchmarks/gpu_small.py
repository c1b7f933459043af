"""Every kernel of an op once, forward and backward, on small packs with odd edges: what compute-sanitizer looks at. A part of gpu_check.py.

The shapes are small but keep the CUDA kernels' rules. Values are compared elsewhere; here they must only be finite.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # a sanitizer sees allocations alone

import torch
from timing import leaf, runnable
from torch import Tensor

from nova_kernels import kv_shift_rope, linear_dpo_loss, packed_attention
from nova_kernels.kv_shift_rope import rope_tables
from nova_kernels.segments import segment_index
from nova_kernels.testing import segment_table

DOCUMENTS = [(1, [1, 1]), (127, [3, 64]), (0, [129]), (30, [1, 2, 65]), (5, [1])]
PADDING = 13
Call = Callable[[str], tuple[Tensor, ...]]


def shift_rope(device: torch.device) -> Iterator[Call]:
    segments, T = pack()
    for H in (64, 128):
        q, k, v = (leaf(device, T, X, H, seed=i) for i, X in enumerate((8, 2, 2)))
        mixes = [leaf(device, 2, 2, seed=3 + i) for i in range(2)]
        tables = [table.to(device) for table in rope_tables(T, H)]
        schedule = segment_index(segments, T).to(device)

        def call(backend: str) -> tuple[Tensor, ...]:
            given = (q, k, v, segments.to(device), *mixes, *tables)
            return gradients(
                kv_shift_rope(*given, schedule=schedule, backend=backend), [q, k, v, *mixes]
            )

        yield call


def attention(device: torch.device) -> Iterator[Call]:
    segments, T = pack()
    for H, N, K in ((64, 8, 2), (128, 8, 2), (128, 2, 2)):
        q, k, v = (leaf(device, T, X, H, seed=i) for i, X in enumerate((N, K, K)))
        schedule = segment_index(segments, T).to(device)

        def call(backend: str) -> tuple[Tensor, ...]:
            given = (q, k, v, segments.to(device))
            return gradients(
                [packed_attention(*given, schedule=schedule, backend=backend)], [q, k, v]
            )

        yield call


def dpo(device: torch.device) -> Iterator[Call]:
    T, R, D = 150, 66, 128
    for V in (1000, 1027):
        hidden = leaf(device, T, D, seed=0)
        weight = leaf(device, V, D, seed=1)
        row_R = torch.arange(R, device=device) * 2
        target_R = torch.arange(R, device=device) * 15 % V
        sequence_R = torch.arange(R, device=device) * 4 // R
        given = (hidden, weight, row_R, target_R, sequence_R, torch.zeros(4, device=device))
        for plan in ("recompute", "store"):

            def call(backend: str) -> tuple[Tensor, ...]:
                result = linear_dpo_loss(*given, beta=0.1, plan=plan, backend=backend)
                return gradients([result.loss_sum], [hidden, weight])

            yield call


def pack() -> tuple[Tensor, int]:
    T = sum(prefix + sum(answers) for prefix, answers in DOCUMENTS) + PADDING
    return segment_table(DOCUMENTS, PADDING), T


def gradients(outputs: tuple[Tensor, ...] | list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    ones = [torch.ones_like(output) for output in outputs]
    return (*outputs, *torch.autograd.grad(outputs, inputs, ones))


CALLS = {"kv_shift_rope": shift_rope, "packed_attention": attention, "linear_dpo": dpo}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", choices=CALLS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Triton's interpreter is no business of a sanitizer
    kinds = ("triton", "cuda") if device.type == "cuda" else ("reference",)
    finite: dict[str, bool] = {}
    for kind in runnable(kinds, device, False):
        results = [t for call in CALLS[arguments.op](device) for t in call(kind)]
        finite[kind] = all(bool(t.isfinite().all()) for t in results)
    arguments.out.write_text(json.dumps({"finite": finite}) + "\n")
    print(json.dumps(finite))
    return int(not all(finite.values()))


if __name__ == "__main__":
    sys.exit(main())
