"""Our ops and their peers on a GPU: `python benchmarks/gpu_ops.py --op packed_attention --out FILE.json`.

Every case states the fewest bytes and floating-point operations that the task needs; the rates count these only, so a provider that
does more work than needed has a lower rate.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gpu_attention
import torch
import torch.nn.functional as F
from gpu_timing import Case, Provider, ceilings, drawn, measure
from torch import Tensor

from nova_kernels import kv_shift_rope, linear_logprob
from nova_kernels.backend import triton_runs_on
from nova_kernels.kv_shift_rope import rope_tables
from nova_kernels.segments import segment_index
from nova_kernels.testing import segment_table

Tensors = Sequence[Tensor]


def leaf(device: torch.device, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
    values = drawn(*shape, device=device, seed=seed) * scale
    return values.to(torch.bfloat16).requires_grad_()


# -- output layer ---------------------------------------------------------------------------------


def linear_logprob_cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    """R rows of T tokens. The backward needs two products; a provider that recomputes the logits does three."""
    shapes = [(8192, 4096, 4096, 128256), (8192, 1024, 4096, 128256), (8192, 8192, 3584, 152064)]
    for T, R, D, V in [(64, 32, 16, 300)] if tiny else shapes:
        hidden = leaf(device, T, D, seed=0, scale=3.0 / D**0.5)
        weight = leaf(device, V, D, seed=1)
        row_R = torch.arange(R, device=device) * (T // R)
        target_R = (torch.arange(R, device=device) * 7919) % V
        given = (hidden, weight, row_R, target_R)
        calls = {"torch, whole logits in fp32": partial(_whole_logits, *given)}
        if triton_runs_on(device):
            for plan in ("recompute", "store"):
                call = partial(linear_logprob, *given, plan=plan, backend="triton")
                calls[f"triton, {plan}"] = partial(_logp, call)
        calls["reference"] = partial(_logp, partial(linear_logprob, *given, backend="reference"))
        if not tiny:
            calls["torch.compile"] = partial(torch.compile(_whole_logits), *given)
        providers = {n: Provider(forward=c, inputs=(hidden, weight)) for n, c in calls.items()}
        yield Case(
            name=f"{R} of {T} rows, hidden {D}, vocabulary {V}",
            providers=providers,
            bytes=(2 * (R + V) * D, 2 * (2 * R + 2 * V) * D),
            flops=(2 * R * D * V, 4 * R * D * V),
        )


def _logp(call: Any) -> tuple[Tensor, ...]:
    return (call().logp_R,)


def _whole_logits(
    hidden: Tensor, weight: Tensor, row_R: Tensor, target_R: Tensor
) -> tuple[Tensor, ...]:
    logits = (hidden[row_R] @ weight.T).float()
    return (-F.cross_entropy(logits, target_R, reduction="none"),)


# -- keys, values and rotary positions ------------------------------------------------------------


def kv_shift_rope_cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    T, N, K, H = (96, 4, 2, 16) if tiny else (16384, 32, 8, 128)
    for count in (1, 3) if tiny else (1, 64, 4096):
        for mixes in (True, False):
            segments = segment_table([(0, [T // count])] * count, T - T // count * count)
            schedule = segment_index(segments, T).to(device)
            q, k, v = (leaf(device, T, X, H, seed=i) for i, X in enumerate((N, K, K)))
            mix = [leaf(device, K, 2, seed=3 + i) for i in range(2)] if mixes else [None, None]
            tables = [t.to(device) for t in rope_tables(T, H)]
            call = partial(
                kv_shift_rope, q, k, v, segments.to(device), *mix, *tables, schedule=schedule
            )
            calls: dict[str, Any] = {"reference": partial(call, backend="reference")}
            if triton_runs_on(device):
                calls["triton"] = partial(call, backend="triton")
            plain = (q, k, v), mix, tables, (schedule.position_T, schedule.previous_T)
            calls["torch"] = partial(_plain_shift_rope, *plain)
            if not tiny:
                calls["torch.compile"] = partial(torch.compile(_plain_shift_rope), *plain)
            inputs = (q, k, v, *(m for m in mix if m is not None))
            # without mixing the values pass through, and the backward reads no keys
            moved = (N + 2 * K if mixes else N + K) * H * 2 * T
            yield Case(
                name=f"{count} documents, {'shifted' if mixes else 'rotary positions only'}",
                providers={n: Provider(forward=c, inputs=inputs) for n, c in calls.items()},
                bytes=(2 * moved, 2 * moved + (4 * K * H * T if mixes else 0)),
                flops=(0, 0),
            )


def _plain_shift_rope(
    qkv: Tensors, mixes: Sequence[Tensor | None], tables: Tensors, index: Tensors
) -> tuple[Tensor, ...]:
    """As a user would write it in torch. index: position and previous token of each token."""
    (q, k, v), (cos_PF, sin_PF), (position_T, previous_T) = qkv, tables, index
    has_T11 = (previous_T >= 0)[:, None, None]

    def mixed(x: Tensor, mix: Tensor | None) -> Tensor:
        if mix is None:
            return x
        before = torch.where(has_T11, x[previous_T.clamp(min=0)], 0.0).float()
        return x.float() * mix[:, 1:].float() + before * mix[:, :1].float()

    cos, sin = cos_PF[position_T][:, None], sin_PF[position_T][:, None]

    def rotated(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(q.dtype)

    return rotated(q), rotated(mixed(k, mixes[0])), mixed(v, mixes[1]).to(v.dtype)


OPS = {
    "kv_shift_rope": kv_shift_rope_cases,
    "linear_logprob": linear_logprob_cases,
    "packed_attention": gpu_attention.cases,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", choices=sorted(OPS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing per case")
    parser.add_argument("--tiny", action="store_true", help="to test the code; also on a CPU")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    most = ceilings(device, tiny=arguments.tiny)
    record: dict[str, Any] = {"op": arguments.op, "ceilings": most, "results": []}
    for case in OPS[arguments.op](device, arguments.tiny):
        record["results"] += measure(case, device, arguments.seconds)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")  # what was measured counts
        for row in record["results"][-len(case.providers) :]:
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
