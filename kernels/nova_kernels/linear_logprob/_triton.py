"""linear_logprob on a GPU: Triton around the products with the weight, cuBLAS for the rest.

Forward, one launch: row tiles times ranges of the vocabulary, each folded into a state, merged.
Backward, per wave of columns: plan "recompute" forms dz from the logits once more, plan "store" from
the exponentials of the forward; all else is the same, and stands in _waves.py.

Legend: T packed tokens, R response rows, D hidden, V vocabulary columns of this rank,
        W columns of one wave, K ranges or half tiles of columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nova_kernels.linear_logprob import _triton_kernels as kernels
from nova_kernels.linear_logprob._triton_rows import INTERPRETED, inverse_norms
from nova_kernels.linear_logprob._triton_tiles import Tile, choose_tile
from nova_kernels.linear_logprob._waves import (
    Block,
    Folded,
    gradients_of,
    merged,
    row_scalars,
    split_rows,
    stored_bytes,
    wave_width,
    whole_state,
)
from nova_kernels.linear_logprob.state import Inputs, Options, RowGradients, RowState

__all__ = ["backward", "forward", "stored_bytes"]

WAVE_GROUP = 16  # row tiles walked down before the next column tile: 16 MiB of rows at D = 4096


def forward(inputs: Inputs, options: Options, *, store: bool) -> Folded:
    """Each row's state over the whole vocabulary; if `store`, exponentials and their maxima."""
    return whole_state(inputs, options, lambda: _fold(inputs, options, store=store))


def _fold(inputs: Inputs, options: Options, *, store: bool) -> Folded:
    """The states over this rank's columns, merged."""
    hidden_TD, weight_VD, row_R, target_R = inputs
    num_rows, D = len(row_R), hidden_TD.shape[1]
    crowded = store and (options.with_entropy or options.with_argmax)
    tile = choose_tile(num_rows, weight_VD.element_size(), crowded=crowded)
    row_tiles = triton.cdiv(num_rows, tile.rows)
    column_tiles = triton.cdiv(options.num_columns, tile.columns)
    group, splits = split_rows(row_tiles, column_tiles, tile.rows * D * weight_VD.element_size())
    state_5KR = torch.empty(5, splits, num_rows, dtype=torch.float32, device=weight_VD.device)
    stored, e_desc, max_KR = (), None, None
    if store:  # whole tiles, so that rows start at multiples of 16 bytes
        e_RV = weight_VD.new_empty(num_rows, column_tiles * tile.columns)
        max_KR = state_5KR.new_empty(2 * column_tiles, num_rows)
        stored, e_desc = (e_RV, max_KR), _half_tiles(e_RV, tile)
    kernels.fold_kernel[(_num_programs(row_tiles * splits, weight_VD),)](
        hidden_TD,
        _weight_tiles(inputs, options, tile),
        e_desc,
        row_R,
        target_R,
        inverse_norms(weight_VD, options),
        state_5KR,
        max_KR,
        num_rows,
        options.num_columns,
        options.first_column,
        1.0 / options.temperature,
        D=D,
        ENTROPY=options.with_entropy,
        ARGMAX=options.with_argmax,
        SPLITS=splits,
        GROUP=group,
        **_launch(tile),
    )
    return merged(state_5KR, options), stored


def backward(
    inputs: Inputs,
    state: RowState,
    stored: tuple[Tensor, ...],
    gradients: RowGradients,
    options: Options,
    *,
    needs_dhidden: bool,
    needs_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dhidden_TD summed over the group, dweight_VD), each in its input's dtype."""
    with torch.cuda.device_of(inputs.weight_VD):
        inverse_norm_V = inverse_norms(inputs.weight_VD, options)
        return gradients_of(
            inputs,
            options,
            _dlogits(inputs, state, stored, gradients, options, inverse_norm_V),
            x_RD=inputs.gathered() if needs_dweight else None,
            inverse_norm_V=inverse_norm_V,
            needs_dhidden=needs_dhidden,
            needs_dweight=needs_dweight,
        )


def _dlogits(
    inputs: Inputs,
    state: RowState,
    stored: tuple[Tensor, ...],
    gradients: RowGradients,
    options: Options,
    inverse_norm_V: Tensor | None,
) -> Iterator[Block]:
    """Per wave: d loss / d (x W^T) in the input's dtype, first and last column."""
    hidden_TD, weight_VD, row_R, target_R = inputs
    num_rows, D = len(row_R), hidden_TD.shape[1]
    if num_rows == 0 or options.num_columns == 0:
        return
    tile = choose_tile(num_rows, weight_VD.element_size(), crowded=False)
    width = wave_width(inputs, options, tile.columns)
    dz_RW = weight_VD.new_empty(num_rows, width)
    rows_8R = row_scalars(state, gradients, options)
    parts = {
        "ENTROPY": gradients.dentropy_R is not None,
        "MAX": gradients.dmax_logit_R is not None,
    }
    for start in range(0, options.num_columns, width):
        stop = min(start + width, options.num_columns)
        wave_tiles = triton.cdiv(stop - start, tile.columns)
        if stored:
            e_RV, max_KR = stored
            half = e_RV.shape[1] // len(max_KR)  # columns of the tiles that fold_kernel stored
            block_m = 64 if INTERPRETED else 16
            grid = (triton.cdiv(num_rows, block_m), triton.cdiv(stop - start, half))
            kernels.stored_dlogits_kernel[grid](
                e_RV,
                dz_RW,
                max_KR,
                target_R,
                inverse_norm_V,
                rows_8R,
                num_rows,
                options.num_columns,
                options.first_column,
                start,
                e_RV.stride(0),
                dz_RW.stride(0),
                **parts,
                BLOCK_M=block_m,
                BLOCK_N=half,
                enable_fp_fusion=True,
            )
        else:
            items = triton.cdiv(num_rows, tile.rows) * wave_tiles
            kernels.dlogits_kernel[(_num_programs(items, weight_VD),)](
                hidden_TD,
                _weight_tiles(inputs, options, tile),
                _half_tiles(dz_RW, tile),
                row_R,
                target_R,
                inverse_norm_V,
                rows_8R,
                num_rows,
                options.num_columns,
                options.first_column,
                start,
                wave_tiles,
                1.0 / options.temperature,
                D=D,
                **parts,
                GROUP=WAVE_GROUP,
                **_launch(tile),
            )
        yield dz_RW[:, : stop - start], start, stop


def _weight_tiles(inputs: Inputs, options: Options, tile: Tile) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(inputs.weight_VD, [tile.columns, tile.depth])


def _half_tiles(block_RV: Tensor, tile: Tile) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(block_RV, [tile.rows, tile.columns // 2])


def _launch(tile: Tile) -> dict[str, int | bool]:
    return {
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "UPCAST": INTERPRETED,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,  # said aloud: a later Triton will not do it unasked
    }


def _num_programs(items: int, tensor: Tensor) -> int:
    """Programs that share the items: one per multiprocessor. No result depends on it."""
    if not tensor.is_cuda:
        return min(items, 3)
    return min(items, torch.cuda.get_device_properties(tensor.device).multi_processor_count)
