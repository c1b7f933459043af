"""packed_attention on the CUDA kernels: buffers, launches and autograd around csrc/cuda/packed_attention.

Legend: T packed tokens, N query heads, K key/value heads, H head dim; a pack of heads: see launch.h.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from nova_kernels.backend import cuda_kernels
from nova_kernels.packed_attention.schedule import attention_schedule, loadable
from nova_kernels.ranges import ranged
from nova_kernels.segments import SegmentIndex

HEAD_DIMS = (64, 128)
MAX_TOKENS, MAX_HEADS = 1 << 20, 1024
BLOCKS = 0  # thread blocks of a launch at most, 0: one per multiprocessor. No result depends on it.


def broken_rule(q_TNH: torch.Tensor, *, softmax_scale: float, window: int) -> str:
    """The rule of the CUDA kernels that these inputs break, or an empty string; their device aside.

    Rows that a tensor map cannot address (heads not side by side, or not on 16 bytes) are no
    broken rule: they are copied.
    """
    T, N, H = q_TNH.shape
    if q_TNH.dtype != torch.bfloat16:
        return f"cuda needs bf16, not {str(q_TNH.dtype).removeprefix('torch.')}"
    if H not in HEAD_DIMS:
        return f"cuda needs a head dim of 64 or 128, not {H}"
    if window:
        return f"cuda knows no window, and this pack has positions beyond one of {window}"
    if not (softmax_scale > 0 and math.isfinite(softmax_scale)):
        return f"cuda needs a positive softmax_scale, not {softmax_scale}"
    if T > MAX_TOKENS or N > MAX_HEADS:
        return f"cuda takes packs of at most {MAX_TOKENS} tokens and {MAX_HEADS} heads"
    return ""


def packed_attention_cuda(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    index: SegmentIndex,
    *,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The public function's work; arguments are checked, and break no rule of `broken_rule`.

    Returns:  out_TNH, and lse_TN fp32 (natural, without gradient).
    """
    return _PackedAttention.apply(q_TNH, k_TKH, v_TKH, index, softmax_scale)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        index: SegmentIndex,
        softmax_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_TNH, k_TKH, v_TKH = (loadable(x) for x in (q_TNH, k_TKH, v_TKH))
        T, N, _ = q_TNH.shape
        out_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
        call = _Call(q_TNH, k_TKH, index, softmax_scale) if T else None
        if call is None:  # nothing to launch
            lse2_PR, lse_TN = q_TNH.new_empty(0), q_TNH.new_empty(0, N, dtype=torch.float32)
        else:
            lse2_PR = call.new_scalars(q_TNH)
            with torch.cuda.device_of(q_TNH):  # launches go to the current device
                call.forward(q_TNH, k_TKH, v_TKH, out_TNH, lse2_PR)
            lse_TN = call.natural(lse2_PR)
        ctx.save_for_backward(q_TNH, k_TKH, v_TKH, out_TNH, lse2_PR)
        ctx.call = call
        ctx.mark_non_differentiable(lse_TN)
        return out_TNH, lse_TN

    @staticmethod
    @once_differentiable
    @ranged("nova_kernels.packed_attention.backward")
    def backward(ctx: Any, dout_TNH: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        q_TNH, k_TKH, v_TKH, out_TNH, lse2_PR = ctx.saved_tensors
        gradients = tuple(
            torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in (q_TNH, k_TKH, v_TKH)
        )
        call: _Call | None = ctx.call
        if call is not None:
            dout_TNH = loadable(dout_TNH)
            with torch.cuda.device_of(q_TNH):
                call.backward(q_TNH, k_TKH, v_TKH, dout_TNH, out_TNH, lse2_PR, gradients)
        return (*gradients, None, None)


class _Call:
    """What the launches of one call share."""

    def __init__(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, index: SegmentIndex, softmax_scale: float
    ) -> None:
        T, N, H = q_TNH.shape
        self.kernels: Any = cuda_kernels()
        self.shape = self.kernels.AttentionShape(T, N, k_TKH.shape[1], H)
        self.softmax_scale, self.index = softmax_scale, index

    def tiles(self, query_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return attention_schedule(self.index, query_tokens, self.shape.key_tokens)

    def new_scalars(self, like: torch.Tensor) -> torch.Tensor:
        """One fp32 value per token and head, as the kernels store them: (packs, row_stride)."""
        return like.new_empty(self.shape.packs, self.shape.row_stride, dtype=torch.float32)

    def natural(self, lse2_PR: torch.Tensor) -> torch.Tensor:
        """(T, N), natural logarithms, of base 2 in the kernels' order."""
        T, P = self.shape.tokens, self.shape.packs
        in_pack = self.shape.heads // P
        lse2_PTX = lse2_PR[:, : T * in_pack].view(P, T, in_pack)
        return lse2_PTX.transpose(0, 1).reshape(T, P * in_pack) * math.log(2.0)

    def forward(
        self,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        out_TNH: torch.Tensor,
        lse2_PR: torch.Tensor,
    ) -> None:
        self.kernels.attention_forward(
            self.shape,
            q=_rows(q_TNH), k=_rows(k_TKH), v=_rows(v_TKH),
            query_tiles=_list(self.tiles(self.shape.forward_tokens)[0]),
            out=out_TNH.data_ptr(), lse2=lse2_PR.data_ptr(), softmax_scale=self.softmax_scale,
            blocks=BLOCKS, stream=_stream(q_TNH),
        )  # fmt: skip

    def backward(
        self,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        dout_TNH: torch.Tensor,
        out_TNH: torch.Tensor,
        lse2_PR: torch.Tensor,
        gradients: tuple[torch.Tensor, ...],
    ) -> None:
        delta_PR = torch.empty_like(lse2_PR)
        query_tiles, key_tiles = self.tiles(self.shape.dq_tokens)
        parts = self.kernels.attention_key_parts(len(key_tiles), k_TKH.shape[1])
        partials_2PTKH = k_TKH.new_empty(
            2, parts if parts > 1 else 0, *k_TKH.shape, dtype=torch.float32
        )
        self.kernels.attention_backward(
            self.shape,
            q=_rows(q_TNH), k=_rows(k_TKH), v=_rows(v_TKH), d_out=_rows(dout_TNH),
            query_tiles=_list(query_tiles), key_tiles=_list(key_tiles),
            out=out_TNH.data_ptr(), lse2_and_delta=(lse2_PR.data_ptr(), delta_PR.data_ptr()),
            dq_dk_dv=tuple(x.data_ptr() for x in gradients),
            partials=partials_2PTKH.data_ptr(), softmax_scale=self.softmax_scale,
            blocks=BLOCKS, stream=_stream(q_TNH),
        )  # fmt: skip


def _rows(x_TXH: torch.Tensor) -> tuple[int, int]:
    T, X, H = x_TXH.shape
    return x_TXH.data_ptr(), x_TXH.stride(0) if T > 1 else X * H


def _list(tiles_I5: torch.Tensor) -> tuple[int, int]:
    return tiles_I5.data_ptr(), len(tiles_I5)


def _stream(x: torch.Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
