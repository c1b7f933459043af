"""KV shifting and packed RoPE in Triton: one launch over Q, K and V forward, one backward.

Legend: T packed tokens, N query heads, K key/value heads, H head dim, F rotary_dim / 2, B blocks of
tokens. X stands for N or K.
The design is told in `_triton_kernels.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from nova_kernels.kv_shift_rope._triton_kernels import bwd_kernel, fwd_kernel
from nova_kernels.segments import SegmentIndex

MAX_HEADS = 8
ELEMENTS = 1024
"""Elements of half a head row's block: 8 per thread of 4 warps, a 16-byte load in bf16."""


def kv_shift_rope_triton(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    mixes: tuple[torch.Tensor | None, torch.Tensor | None],
    tables: tuple[torch.Tensor, torch.Tensor],
    index: SegmentIndex,
    *,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The public function's work; arguments are checked. mixes: of keys and of values; tables: cos, sin (P, F)."""
    q, k, v = _ShiftRope.apply(q_TNH, k_TKH, v_TKH, *mixes, *tables, index, interleaved)
    return q, k, v_TKH if mixes[1] is None else v


class _ShiftRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        k_mix_K2: torch.Tensor | None,
        v_mix_K2: torch.Tensor | None,
        cos_PF: torch.Tensor,
        sin_PF: torch.Tensor,
        index: SegmentIndex,
        interleaved: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        inputs = [_last_dim_contiguous(x) for x in (q_TNH, k_TKH, v_TKH)]
        mixes = [None if mix is None else mix.contiguous() for mix in (k_mix_K2, v_mix_K2)]
        tables = (cos_PF.contiguous(), sin_PF.contiguous())
        v_out = None if v_mix_K2 is None else _empty(inputs[2])
        outputs = (_empty(inputs[0]), _empty(inputs[1]), v_out)
        split = _Split(q_TNH, k_TKH, with_v=v_mix_K2 is not None)
        if split.grid[0]:
            fwd_kernel[split.grid](
                *inputs, *outputs, *mixes, *tables, index.position_T, index.previous_T,
                len(q_TNH), *_strides(*inputs), *split.groups, **split.constants(cos_PF, interleaved),
            )  # fmt: skip
        ctx.save_for_backward(
            inputs[1] if mixes[0] is not None else None,
            inputs[2] if mixes[1] is not None else None,
            *mixes,
            *tables,
        )
        ctx.index, ctx.interleaved = index, interleaved
        return outputs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dq_out: torch.Tensor, dk_out: torch.Tensor, dv_out: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        k_TKH, v_TKH, k_mix_K2, v_mix_K2, cos_PF, sin_PF = ctx.saved_tensors
        index: SegmentIndex = ctx.index
        upstream = [
            None if x is None else _last_dim_contiguous(x) for x in (dq_out, dk_out, dv_out)
        ]
        if v_mix_K2 is None:
            upstream[2] = None  # v was passed on as it is
        grads = [None if x is None else _empty(x) for x in upstream]
        split = _Split(dq_out, dk_out, with_v=upstream[2] is not None)
        partial_BMK2 = dk_out.new_empty((split.grid[0], 2, dk_out.shape[1], 2), dtype=torch.float32)
        offset_T1, successor_J = index.successors
        if split.grid[0]:
            bwd_kernel[split.grid](
                *upstream, *grads, k_TKH, v_TKH, k_mix_K2, v_mix_K2, cos_PF, sin_PF, partial_BMK2,
                index.position_T, index.previous_T, offset_T1, successor_J,
                len(dq_out), len(cos_PF), *_strides(*upstream), *_strides(None, k_TKH, v_TKH)[2:],
                *split.groups, **split.constants(cos_PF, ctx.interleaved),
            )  # fmt: skip
        dmixes = [
            None if mix is None else partial_BMK2[:, i].sum(0).to(mix.dtype)
            for i, mix in enumerate((k_mix_K2, v_mix_K2))
        ]
        return *grads, *dmixes, None, None, None, None


class _Split:
    """Which program does what. groups: the number of head groups of Q and of K, the rest is V's."""

    def __init__(self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, *, with_v: bool) -> None:
        (T, N, self.H), K = q_TNH.shape, k_TKH.shape[1]
        self.N, self.K = N, K
        self.q_heads, self.kv_heads = math.gcd(N, MAX_HEADS), math.gcd(K, MAX_HEADS)
        self.block_t = max(1, ELEMENTS // triton.next_power_of_2(max(1, self.H // 2)))
        self.groups = (N // self.q_heads, K // self.kv_heads)
        self.grid = (
            triton.cdiv(T, self.block_t),
            self.groups[0] + self.groups[1] * (1 + with_v),
        )

    def constants(self, cos_PF: torch.Tensor, interleaved: bool) -> dict[str, Any]:
        F = cos_PF.shape[1]
        return {
            "N": self.N,
            "K": self.K,
            "H": self.H,
            "F": F,
            "INTERLEAVED": interleaved,
            "Q_HEADS": self.q_heads,
            "KV_HEADS": self.kv_heads,
            "BLOCK_T": self.block_t,
            "BLOCK_F": triton.next_power_of_2(F),
            "BLOCK_REST": triton.next_power_of_2(max(1, self.H - 2 * F)),
            "BLOCK_H": triton.next_power_of_2(self.H),
        }


def _last_dim_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _strides(*tensors: torch.Tensor | None) -> tuple[int, ...]:
    """Of tokens and heads, tensor by tensor; a tensor that is absent has zeros."""
    return tuple(s for x in tensors for s in ((0, 0) if x is None else x.stride()[:2]))
