"""packed_attention on Triton: tiles, launches and autograd around `_triton_kernels.py`.

Legend: T packed tokens, N query heads, K key/value heads, H head dim, G = N / K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from nova_kernels.packed_attention._triton_kernels import dkv_kernel, dq_kernel, fwd_kernel
from nova_kernels.packed_attention.schedule import attention_schedule, loadable
from nova_kernels.ranges import ranged
from nova_kernels.segments import SegmentIndex

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Tile:
    """rows of a query tile, keys of a key tile, and how the kernel is compiled. pack: the query heads that
    share a key head lie side by side in the rows (if their number is a power of two)."""

    rows: int
    keys: int
    warps: int
    stages: int
    pack: bool = True


@dataclass(frozen=True)
class Tiles:
    fwd: Tile
    dq: Tile
    dkv: Tile


TILES = {  # up to which head dim; the reasons stand in this folder's README.md
    64: Tiles(fwd=Tile(128, 128, 8, 2), dq=Tile(128, 64, 8, 2), dkv=Tile(64, 128, 8, 2)),
    96: Tiles(fwd=Tile(128, 64, 8, 3), dq=Tile(128, 64, 8, 2), dkv=Tile(32, 64, 8, 2)),
    128: Tiles(fwd=Tile(128, 64, 8, 3), dq=Tile(128, 64, 8, 2), dkv=Tile(32, 128, 8, 2)),
    192: Tiles(
        fwd=Tile(128, 32, 8, 2, pack=False),
        dq=Tile(128, 32, 8, 2, pack=False),
        dkv=Tile(16, 64, 8, 2),
    ),
    256: Tiles(
        fwd=Tile(128, 64, 8, 2, pack=False),
        dq=Tile(128, 32, 8, 2, pack=False),
        dkv=Tile(16, 64, 8, 2),
    ),
}


def tiles_of(head_dim: int) -> Tiles:
    return TILES[min(limit for limit in TILES if head_dim <= limit)]


def packed_attention_triton(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    index: SegmentIndex,
    *,
    softmax_scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The public function's work; arguments are checked.

    Returns:  out_TNH, and lse_TN fp32 (natural, without gradient).
    """
    return _PackedAttention.apply(q_TNH, k_TKH, v_TKH, index, softmax_scale, window)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        index: SegmentIndex,
        softmax_scale: float,
        window: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_TNH, k_TKH, v_TKH = (loadable(x) for x in (q_TNH, k_TKH, v_TKH))
        call = _Call(q_TNH, k_TKH, index, window)
        out_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
        lse_TN = q_TNH.new_empty(q_TNH.shape[:2], dtype=torch.float32)
        tile = call.tiles.fwd
        call.launch(
            fwd_kernel, tile, call.query_tiles(tile), call.N // call.pack(tile),
            call.rows(q_TNH, tile), call.keys(k_TKH, tile), call.keys(v_TKH, tile),
            out_TNH, lse_TN, scale=softmax_scale * LOG2E,
        )  # fmt: skip
        ctx.save_for_backward(q_TNH, k_TKH, v_TKH, out_TNH, lse_TN)
        ctx.call, ctx.softmax_scale = call, softmax_scale
        natural_TN = lse_TN / LOG2E
        ctx.mark_non_differentiable(natural_TN)
        return out_TNH, natural_TN

    @staticmethod
    @once_differentiable
    @ranged("nova_kernels.packed_attention.backward")
    def backward(ctx: Any, dout_TNH: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        q_TNH, k_TKH, v_TKH, out_TNH, lse_TN = ctx.saved_tensors
        call: _Call = ctx.call
        dout_TNH = loadable(dout_TNH)
        dq_TNH, dk_TKH, dv_TKH = (
            torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in (q_TNH, k_TKH, v_TKH)
        )
        delta_TN = torch.empty_like(lse_TN)
        scales = {"scale": ctx.softmax_scale * LOG2E, "softmax_scale": ctx.softmax_scale}
        tile = call.tiles.dq
        call.launch(
            dq_kernel, tile, call.query_tiles(tile), call.N // call.pack(tile),
            call.rows(q_TNH, tile), call.keys(k_TKH, tile), call.keys(v_TKH, tile),
            call.rows(out_TNH, tile), call.rows(dout_TNH, tile), dq_TNH, lse_TN, delta_TN, **scales,
        )  # fmt: skip
        tile = call.tiles.dkv
        call.launch(
            dkv_kernel, tile, call.key_tiles(tile), k_TKH.shape[1],
            call.rows(q_TNH, tile), call.keys(k_TKH, tile), call.keys(v_TKH, tile),
            call.rows(dout_TNH, tile), dk_TKH, dv_TKH, lse_TN, delta_TN,
            call.index.position_T if call.window else None, **scales,
        )  # fmt: skip
        return dq_TNH, dk_TKH, dv_TKH, None, None, None


def heads_in_row_tile(tile: Tile, group: int) -> int:
    """Query heads side by side in a row tile, of the `group` that share a key head."""
    return group if tile.pack and group in (2, 4, 8, 16) else 1


def tile_sizes(N: int, K: int, H: int) -> list[tuple[int, int]]:
    """(tokens of a query tile, tokens of a key tile) of every list that the kernels loop over."""
    tiles = tiles_of(H)
    return [
        (tile.rows // heads_in_row_tile(tile, N // K), tile.keys)
        for tile in (tiles.fwd, tiles.dq, tiles.dkv)
    ]


class _Call:
    """What the launches of one call share."""

    def __init__(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, index: SegmentIndex, window: int
    ) -> None:
        _, self.N, self.H = q_TNH.shape
        self.group = self.N // k_TKH.shape[1]
        self.tiles, self.index, self.window = tiles_of(self.H), index, window
        self.block_h = max(64, triton.next_power_of_2(self.H))

    def pack(self, tile: Tile) -> int:
        return heads_in_row_tile(tile, self.group)

    def query_tiles(self, tile: Tile) -> torch.Tensor:
        return attention_schedule(self.index, tile.rows // self.pack(tile), tile.keys)[0]

    def key_tiles(self, tile: Tile) -> torch.Tensor:
        return attention_schedule(self.index, tile.rows // self.pack(tile), tile.keys)[1]

    def rows(self, x_TNH: torch.Tensor, tile: Tile) -> TensorDescriptor:
        return self._descriptor(x_TNH, tile.rows // self.pack(tile), self.pack(tile))

    def keys(self, x_TKH: torch.Tensor, tile: Tile) -> TensorDescriptor:
        return self._descriptor(x_TKH, tile.keys, 1)

    def _descriptor(self, x_TXH: torch.Tensor, tokens: int, heads: int) -> TensorDescriptor:
        """As `_load_keys` and `_load_queries` expect it: flat where a block is whole heads of one width."""
        (T, X, H), (stride_t, stride_x, _) = x_TXH.shape, x_TXH.stride()
        if heads == 1 and self.block_h == H:
            return TensorDescriptor(x_TXH, [T, X * H], [stride_t, 1], [tokens, H])
        return TensorDescriptor(
            x_TXH, [T, X, H], [stride_t, stride_x, 1], [tokens, heads, self.block_h]
        )

    def launch(
        self,
        kernel: Any,
        tile: Tile,
        tiles_I5: torch.Tensor,
        heads: int,
        *tensors: Any,
        **scales: float,
    ) -> None:
        """One program per tile and (group of) heads; the hardware starts them in order, longest first."""
        if len(tiles_I5) == 0:
            return
        kernel[(len(tiles_I5) * heads,)](
            *tensors, tiles_I5, self.N, *scales.values(),
            GROUP=self.group, PACK=self.pack(tile), H=self.H, BLOCK_M=tile.rows, BLOCK_N=tile.keys,
            BLOCK_H=self.block_h, WINDOW=self.window, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
