"""Cases of kv_shift_rope: keys and values mixed with their predecessors', and rotary positions.

What is counted are the fewest bytes that the task must move; a provider that moves more has a lower rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from timing import Case, Provider, leaf, runnable
from torch import Tensor

from nova_kernels import kv_shift_rope
from nova_kernels.kv_shift_rope import rope_tables
from nova_kernels.segments import segment_index
from nova_kernels.testing import segment_table

Tensors = Sequence[Tensor]


def cases(device: torch.device, tiny: bool, backends: Sequence[str]) -> Iterator[Case]:
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
            calls: dict[str, Any] = {
                backend: partial(call, backend=backend)
                for backend in runnable(backends, device, tiny)
            }
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
