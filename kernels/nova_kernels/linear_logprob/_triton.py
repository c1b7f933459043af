"""linear_logprob on a GPU: Triton around the products with the weight, cuBLAS for the rest.

Forward, one launch: row tiles times ranges of the vocabulary, each folded into a state, merged.
Backward, per wave of vocabulary columns with all rows: dz (R, W) in the input's dtype, then
dW[wave] = dz^T x, complete and in fp32 after this one product, and dx += dz W[wave] in fp32. Plan
"recompute" forms dz from the logits once more, plan "store" from the exponentials of the forward;
all else is the same. Everything that scales a row or column of dz (upstream gradient, temperature,
norms) is multiplied in before its one rounding.

Legend: T packed tokens, R response rows, D hidden, V vocabulary columns of this rank,
        W columns of one wave, K ranges or half tiles of columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nova_kernels.linear_logprob import _triton_kernels as kernels
from nova_kernels.linear_logprob import _triton_row_kernels as row_kernels
from nova_kernels.linear_logprob._triton_tiles import Tile, choose_tile, split_rows
from nova_kernels.linear_logprob.state import (
    NORM_EPS,
    Inputs,
    Options,
    RowGradients,
    RowState,
    empty_state,
    merge,
    merge_over_ranks,
    present,
)

INTERPRETED = not isinstance(kernels.fold_kernel, triton.JITFunction)
WAVE_GROUP = 16  # row tiles walked down before the next column tile: 16 MiB of rows at D = 4096


def stored_bytes(inputs: Inputs) -> int:
    """What plan "store" keeps until backward."""
    return len(inputs.row_R) * inputs.weight_VD.shape[0] * inputs.weight_VD.element_size()


def forward(
    inputs: Inputs, options: Options, *, store: bool
) -> tuple[RowState, tuple[Tensor, ...]]:
    """Each row's state over the whole vocabulary; if `store`, exponentials and their maxima."""
    weight_VD, num_rows = inputs.weight_VD, len(inputs.row_R)
    if num_rows == 0 or options.num_columns == 0:
        state, stored = (
            empty_state(num_rows, weight_VD.new_empty(0, dtype=torch.float32), options),
            (),
        )
    else:
        with torch.cuda.device_of(weight_VD):
            state, stored = _fold(inputs, options, store=store)
    if options.group is not None:
        state = merge_over_ranks(state, options.group)  # now over the whole vocabulary
    return state, stored


def _fold(inputs: Inputs, options: Options, *, store: bool) -> tuple[RowState, tuple[Tensor, ...]]:
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
        _inverse_norms(weight_VD, options),
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
    max_, sum_, logit, moment, argmax = state_5KR.unbind()
    by_split = RowState(
        max_,
        sum_,
        logit,
        moment if options.with_entropy else None,
        argmax if options.with_argmax else None,
    )
    return merge(by_split), stored


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
    weight_VD, num_rows = inputs.weight_VD, len(inputs.row_R)
    dx_RD = dweight_VD = x_RD = None
    if needs_dhidden:
        shape = (num_rows, weight_VD.shape[1])
        dx_RD = torch.zeros(shape, dtype=torch.float32, device=weight_VD.device)
    if needs_dweight:
        x_RD = inputs.gathered()
        dweight_VD = torch.empty_like(weight_VD)
        dweight_VD[options.num_columns if num_rows else 0 :].zero_()
    with torch.cuda.device_of(weight_VD):
        inverse_norm_V = _inverse_norms(weight_VD, options)
        blocks = _dlogits(inputs, state, stored, gradients, options, inverse_norm_V)
        for dz_RW, start, stop in blocks:
            weight_WD = weight_VD[start:stop]
            if dx_RD is not None:
                _accumulate(dx_RD, dz_RW, weight_WD)
            if dweight_VD is not None and inverse_norm_V is None:
                torch.mm(dz_RW.t(), present(x_RD), out=dweight_VD[start:stop])
            elif dweight_VD is not None:
                u_WD = _mm_fp32(dz_RW.t(), present(x_RD))
                norm_W = present(inverse_norm_V)[start:stop]
                _project(u_WD, weight_WD, norm_W, out=dweight_VD[start:stop])
        if dx_RD is None:
            return None, dweight_VD
        if options.group is not None and num_rows:
            dist.all_reduce(dx_RD, group=options.group)  # now summed over the whole vocabulary
        return sum_rows(dx_RD, inputs.row_R, like=inputs.hidden_TD), dweight_VD


def wave_width(inputs: Inputs, options: Options, tile: Tile) -> int:
    """Columns whose dz, and fp32 dW under NormHead, fit the workspace: whole tiles, at least one."""
    num_rows, D = len(inputs.row_R), inputs.hidden_TD.shape[1]
    per_column = num_rows * inputs.weight_VD.element_size() + (4 * D if options.normalize else 0)
    tiles = max(1, options.workspace_bytes // (per_column * tile.columns))
    return min(tiles, triton.cdiv(options.num_columns, tile.columns)) * tile.columns


def _dlogits(
    inputs: Inputs,
    state: RowState,
    stored: tuple[Tensor, ...],
    gradients: RowGradients,
    options: Options,
    inverse_norm_V: Tensor | None,
) -> Iterator[tuple[Tensor, int, int]]:
    """Per wave: d loss / d (x W^T) in the input's dtype, first and last column."""
    hidden_TD, weight_VD, row_R, target_R = inputs
    num_rows, D = len(row_R), hidden_TD.shape[1]
    if num_rows == 0 or options.num_columns == 0:
        return
    tile = choose_tile(num_rows, weight_VD.element_size(), crowded=False)
    width = wave_width(inputs, options, tile)
    dz_RW = weight_VD.new_empty(num_rows, width)
    rows_8R = _row_scalars(state, gradients, options)
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


def _row_scalars(state: RowState, gradients: RowGradients, options: Options) -> Tensor:
    """What one row of dz needs, in the order of kernels._dlogits."""
    zero_R = torch.zeros_like(state.max_R)
    dentropy_R, dmax_R = gradients.dentropy_R, gradients.dmax_logit_R
    rows = [
        state.max_R,
        state.sum_R.log2(),
        state.target_R,
        gradients.dlogp_R / options.temperature,
        zero_R if dentropy_R is None else dentropy_R / options.temperature,
        zero_R if dentropy_R is None else state.entropy(),
        zero_R if dmax_R is None else dmax_R / options.temperature,
        zero_R if dmax_R is None else present(state.argmax_R) - options.first_column,
    ]
    return torch.stack(rows)


def sum_rows(dx_RD: Tensor, row_R: Tensor, *, like: Tensor) -> Tensor:
    """(T, D) of `like`'s shape and dtype: each token's sum of its rows, in their order in row_R."""
    out_TD = torch.empty_like(like)
    num_tokens, D = like.shape
    if num_tokens == 0:
        return out_TD
    sorted_R, order_R = torch.sort(row_R, stable=True)
    start_T1 = torch.searchsorted(
        sorted_R, torch.arange(num_tokens + 1, device=row_R.device, dtype=row_R.dtype)
    )
    block_t, block_d = (64, 64) if INTERPRETED else (4, 512)
    row_kernels.sum_rows_kernel[(triton.cdiv(num_tokens, block_t), triton.cdiv(D, block_d))](
        dx_RD, order_R, start_T1, out_TD, num_tokens, D=D, BLOCK_T=block_t, BLOCK_D=block_d
    )
    return out_TD


def _inverse_norms(weight_VD: Tensor, options: Options) -> Tensor | None:
    """1 / length of each valid row of the weight, under NormHead."""
    if not options.normalize:
        return None
    out_V = torch.empty(options.num_columns, dtype=torch.float32, device=weight_VD.device)
    grid, blocks = _column_blocks(options.num_columns)
    row_kernels.inverse_norm_kernel[grid](
        weight_VD, out_V, options.num_columns, EPS=NORM_EPS, D=weight_VD.shape[1], **blocks
    )
    return out_V


def _project(u_WD: Tensor, weight_WD: Tensor, inverse_norm_W: Tensor, *, out: Tensor) -> None:
    grid, blocks = _column_blocks(len(u_WD))
    row_kernels.project_kernel[grid](
        u_WD, weight_WD, inverse_norm_W, out, len(u_WD), D=u_WD.shape[1], **blocks
    )


def _column_blocks(num_columns: int) -> tuple[tuple[int], dict[str, int]]:
    block_v = 64 if INTERPRETED else 4
    return (triton.cdiv(num_columns, block_v),), {"BLOCK_V": block_v, "BLOCK_D": 512}


def _accumulate(dx_RD: Tensor, dz_RW: Tensor, weight_WD: Tensor) -> None:
    """dx += dz W in fp32."""
    if dz_RW.dtype == torch.float32:
        dx_RD.addmm_(dz_RW, weight_WD)
    elif dz_RW.is_cuda:
        torch.addmm(dx_RD, dz_RW, weight_WD, out_dtype=torch.float32, out=dx_RD)
    else:  # a CPU has no product of narrow factors with a wide result
        dx_RD.addmm_(dz_RW.float(), weight_WD.float())


def _mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


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
