"""Every kernel of an op once, forward and backward, on small packs with odd edges: what compute-sanitizer looks at. A part of gpu_check.py.

The shapes are small but keep the CUDA kernels' rules. Values are compared elsewhere; here they must only be finite.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
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
Tensors = tuple[Tensor, ...]


def shift_rope(device: torch.device, backend: str) -> Iterator[Tensors]:
    segments, T = pack()
    for H in (64, 128):
        q, k, v = (leaf(device, T, X, H, seed=i) for i, X in enumerate((8, 2, 2)))
        mixes = [leaf(device, 2, 2, seed=3 + i) for i in range(2)]
        given = (q, k, v, segments.to(device), *mixes, *(t.to(device) for t in rope_tables(T, H)))
        schedule = segment_index(segments, T).to(device)
        outputs = kv_shift_rope(*given, schedule=schedule, backend=backend)
        yield with_gradients(outputs, [q, k, v, *mixes])


def attention(device: torch.device, backend: str) -> Iterator[Tensors]:
    segments, T = pack()
    schedule = segment_index(segments, T).to(device)
    for H, N, K in ((64, 8, 2), (128, 8, 2), (128, 2, 2)):
        qkv = [leaf(device, T, X, H, seed=i) for i, X in enumerate((N, K, K))]
        given = (*qkv, segments.to(device))
        yield with_gradients(
            [packed_attention(*given, schedule=schedule, backend=backend)],
            qkv,
        )


def dpo(device: torch.device, backend: str) -> Iterator[Tensors]:
    T, R, D = 150, 66, 128
    for V, plan in ((1000, "recompute"), (1000, "store"), (1027, "recompute"), (1027, "store")):
        hidden, weight = leaf(device, T, D, seed=0), leaf(device, V, D, seed=1)
        number_R = torch.arange(R, device=device)
        rows = (number_R * 2, number_R * 15 % V, number_R * 4 // R)
        ref_logp_S = torch.zeros(4, device=device)
        result = linear_dpo_loss(
            hidden, weight, *rows, ref_logp_S, beta=0.1, plan=plan, backend=backend
        )
        yield with_gradients([result.loss_sum], [hidden, weight])


def pack() -> tuple[Tensor, int]:
    T = sum(prefix + sum(answers) for prefix, answers in DOCUMENTS) + PADDING
    return segment_table(DOCUMENTS, PADDING), T


def with_gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensors:
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
        results = [t for tensors in CALLS[arguments.op](device, kind) for t in tensors]
        finite[kind] = all(bool(t.isfinite().all()) for t in results)
    arguments.out.write_text(json.dumps({"finite": finite}) + "\n")
    print(json.dumps(finite))
    return int(not all(finite.values()))


if __name__ == "__main__":
    sys.exit(main())
