"""KV shifting, packed RoPE and norms in Triton: one launch over Q, K and V forward, one backward.

Legend: T packed tokens, N query heads, K key/value heads, H head dim, F rotary_dim / 2, B blocks of
tokens, G groups of heads of Q and K, M the two mixes. X stands for N or K.
The design is told in `_triton_kernels.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from nova_kernels.kv_shift_rope._triton_kernels import bwd_kernel, fwd_kernel
from nova_kernels.kv_shift_rope.state import Options, Weights
from nova_kernels.ranges import ranged
from nova_kernels.segments import SegmentIndex

MAX_HEADS = 8
ELEMENTS = 1024
"""Elements of half a head row's block: 8 per thread of 4 warps, a 16-byte load in bf16."""


def kv_shift_rope_triton(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    weights: Weights,
    tables: tuple[torch.Tensor, torch.Tensor],
    index: SegmentIndex,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The public function's work; arguments are checked. tables: cos, sin (P, F)."""
    q, k, v = _ShiftRope.apply(q_TNH, k_TKH, v_TKH, *weights, *tables, index, options)
    return q, k, v_TKH if weights.v_mix_K2 is None else v


class _ShiftRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        k_mix_K2: torch.Tensor | None,
        v_mix_K2: torch.Tensor | None,
        q_norm_H: torch.Tensor | None,
        k_norm_H: torch.Tensor | None,
        cos_PF: torch.Tensor,
        sin_PF: torch.Tensor,
        index: SegmentIndex,
        options: Options,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        inputs = [_last_dim_contiguous(x) for x in (q_TNH, k_TKH, v_TKH)]
        weights = Weights(
            *(
                None if w is None else w.contiguous()
                for w in (k_mix_K2, v_mix_K2, q_norm_H, k_norm_H)
            )
        )
        tables = (cos_PF.contiguous(), sin_PF.contiguous())
        q_out = q_TNH if options.inplace_q else _empty(q_TNH)
        v_out = None if v_mix_K2 is None else _empty(v_TKH)
        outputs = (q_out, _empty(k_TKH), v_out)
        split = _Split(q_TNH, k_TKH, with_v=v_mix_K2 is not None)
        if split.grid[0]:
            fwd_kernel[split.grid](
                *inputs, *outputs, *weights, *tables, index.position_T, index.previous_T,
                len(q_TNH), options.norm_eps, *_strides(*inputs, q_out), *split.groups,
                **split.constants(cos_PF, options),
            )  # fmt: skip
        if options.inplace_q:
            ctx.mark_dirty(q_TNH)
            if not ctx.needs_input_grad[0]:  # or it would seem to depend on k and v
                ctx.mark_non_differentiable(q_TNH)
        raw = (weights.q_norm_H is not None and not options.inplace_q,
               weights.k_norm_H is not None or weights.k_mix_K2 is not None,
               weights.v_mix_K2 is not None)  # fmt: skip
        kept = [x if keep else None for x, keep in zip(inputs, raw, strict=True)]
        if options.inplace_q:  # neither q nor its norm wants a gradient that needs the norm
            weights = weights._replace(q_norm_H=None)
        ctx.save_for_backward(*kept, *weights, *tables)
        ctx.index, ctx.options = index, options
        return outputs

    @staticmethod
    @once_differentiable
    @ranged("nova_kernels.kv_shift_rope.backward")
    def backward(
        ctx: Any, dq_out: torch.Tensor, dk_out: torch.Tensor, dv_out: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        raw, weights = ctx.saved_tensors[:3], Weights(*ctx.saved_tensors[3:7])
        cos_PF, sin_PF = ctx.saved_tensors[7:]
        index: SegmentIndex = ctx.index
        upstream = [
            None if x is None else _last_dim_contiguous(x) for x in (dq_out, dk_out, dv_out)
        ]
        if weights.v_mix_K2 is None:
            upstream[2] = None  # v was passed on as it is
        grads = [None if x is None else _empty(x) for x in upstream]
        split = _Split(dq_out, dk_out, with_v=upstream[2] is not None)
        num_blocks, (q_groups, k_groups) = split.grid[0], split.groups
        partial_BMK2 = dk_out.new_empty((num_blocks, 2, split.K, 2), dtype=torch.float32)
        normed = weights.q_norm_H is not None or weights.k_norm_H is not None
        rows = num_blocks if normed else 0
        partial_BGH = dk_out.new_empty((rows, q_groups + k_groups, split.H), dtype=torch.float32)
        offset_T1, successor_J = index.successors
        if num_blocks:
            bwd_kernel[split.grid](
                *upstream, *grads, *raw, *weights, cos_PF, sin_PF, partial_BMK2, partial_BGH,
                index.position_T, index.previous_T, offset_T1, successor_J,
                len(dq_out), len(cos_PF), ctx.options.norm_eps, *_strides(*upstream, *raw),
                *split.groups, **split.constants(cos_PF, ctx.options, N=split.N),
            )  # fmt: skip
        dweights = Weights(
            partial_BMK2[:, 0].sum(0),
            partial_BMK2[:, 1].sum(0),
            partial_BGH[:, :q_groups].sum((0, 1)),
            partial_BGH[:, q_groups:].sum((0, 1)),
        )
        dweights = [
            None if w is None else dw.to(w.dtype) for w, dw in zip(weights, dweights, strict=True)
        ]
        return *grads, *dweights, None, None, None, None


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

    def constants(self, cos_PF: torch.Tensor, options: Options, **more: int) -> dict[str, Any]:
        F = cos_PF.shape[1]
        return {
            **more,
            "K": self.K,
            "H": self.H,
            "F": F,
            "INTERLEAVED": options.interleaved,
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
