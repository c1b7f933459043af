"""What the GPU backends of linear_logprob share: all around the kernels that multiply with the weight.

Backward, per wave of vocabulary columns with all rows: a backend forms dz (R, W) in the input's
dtype, then dW[wave] = dz^T x, complete and in fp32 after this one product, and dx += dz W[wave] in
fp32, both by cuBLAS. Everything that scales a row or column of dz (upstream gradient, temperature,
norms) is multiplied in before its one rounding.

Legend: T packed tokens, R response rows, D hidden, V vocabulary columns of this rank,
        W columns of one wave, K ranges or tiles of columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from nova_kernels.linear_logprob._triton_rows import project, sum_rows
from nova_kernels.linear_logprob.state import (
    Inputs,
    Options,
    RowGradients,
    RowState,
    empty_state,
    merge,
    merge_over_ranks,
    present,
)

L2_ROWS_BYTES = 32 << 20  # gathered rows that stay in a Hopper GPU's L2 (50 MB) while W streams by
PROGRAMS = 132  # tiles at work at once on an H100, which the split aims at

Folded = tuple[RowState, tuple[Tensor, ...]]
Block = tuple[Tensor, int, int]
"""dz of one wave (R, W) in the input's dtype, its first and last column."""


def stored_bytes(inputs: Inputs) -> int:
    """What plan "store" keeps until backward."""
    return len(inputs.row_R) * inputs.weight_VD.shape[0] * inputs.weight_VD.element_size()


@functools.lru_cache
def split_rows(
    row_tiles: int, column_tiles: int, row_tile_bytes: int, programs: int = PROGRAMS
) -> tuple[int, int]:
    """(row tiles in flight together, ranges that each of them cuts the vocabulary into).

    A round is `group` row tiles times `splits` ranges, at most `programs`. All programs of
    a range walk W together, so a round reads W from memory once; its rows must stay in L2. The
    fewest steps of a program win, then the fewest rounds, then the fewest ranges to merge.
    Nothing here depends on the GPU's number of multiprocessors, so no result does either.
    """
    most = max(1, min(row_tiles, programs, L2_ROWS_BYTES // row_tile_bytes))

    def cost(group: int, splits: int) -> tuple[int, int, int]:
        rounds = -(-row_tiles // group)
        return rounds * -(-column_tiles // splits), rounds, splits

    choices = (
        (group, splits)
        for group in range(1, most + 1)
        for splits in range(1, min(column_tiles, programs // group) + 1)
    )
    return min(choices, key=lambda choice: cost(*choice))


def wave_width(inputs: Inputs, options: Options, tile_columns: int) -> int:
    """Columns whose dz, and fp32 dW under NormHead, fit the workspace: whole tiles, at least one."""
    num_rows, D = len(inputs.row_R), inputs.hidden_TD.shape[1]
    per_column = num_rows * inputs.weight_VD.element_size() + (4 * D if options.normalize else 0)
    tiles = max(1, options.workspace_bytes // (per_column * tile_columns))
    return min(tiles, -(-options.num_columns // tile_columns)) * tile_columns


def whole_state(inputs: Inputs, options: Options, fold: Callable[[], Folded]) -> Folded:
    """The state over every rank's columns; `fold` gives the one over ours, unless there are none."""
    weight_VD, num_rows = inputs.weight_VD, len(inputs.row_R)
    if num_rows == 0 or options.num_columns == 0:
        like = weight_VD.new_empty(0, dtype=torch.float32)
        state, stored = empty_state(num_rows, like, options), ()
    else:
        with torch.cuda.device_of(weight_VD):
            state, stored = fold()
    if options.group is not None:
        state = merge_over_ranks(state, options.group)  # now over the whole vocabulary
    return state, stored


def merged(state_5KR: Tensor, options: Options) -> RowState:
    """One state from those of K ranges, as the kernels write them."""
    max_, sum_, logit, moment, argmax = state_5KR.unbind()
    return merge(
        RowState(
            max_,
            sum_,
            logit,
            moment if options.with_entropy else None,
            argmax if options.with_argmax else None,
        )
    )


def row_scalars(state: RowState, gradients: RowGradients, options: Options) -> Tensor:
    """What one row of dz needs, (8, R), in the order in which the kernels read it."""
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


def gradients_of(
    inputs: Inputs,
    options: Options,
    blocks: Iterable[Block],
    *,
    x_RD: Tensor | None,
    inverse_norm_V: Tensor | None,
    needs_dhidden: bool,
    needs_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dhidden_TD summed over the group, dweight_VD), each in its input's dtype.

    x_RD: the gathered rows; None is enough without dweight.
    """
    weight_VD, num_rows = inputs.weight_VD, len(inputs.row_R)
    dx_RD = dweight_VD = None
    if needs_dhidden:
        shape = (num_rows, weight_VD.shape[1])
        dx_RD = torch.zeros(shape, dtype=torch.float32, device=weight_VD.device)
    if needs_dweight:
        dweight_VD = torch.empty_like(weight_VD)
        dweight_VD[options.num_columns if num_rows else 0 :].zero_()
    for dz_RW, start, stop in blocks if num_rows else ():
        weight_WD = weight_VD[start:stop]
        if dx_RD is not None:
            _accumulate(dx_RD, dz_RW, weight_WD)
        if dweight_VD is not None and inverse_norm_V is None:
            torch.mm(dz_RW.t(), present(x_RD), out=dweight_VD[start:stop])
        elif dweight_VD is not None:
            u_WD = _mm_fp32(dz_RW.t(), present(x_RD))
            norm_W = present(inverse_norm_V)[start:stop]
            project(u_WD, weight_WD, norm_W, out=dweight_VD[start:stop])
    if dx_RD is None:
        return None, dweight_VD
    if options.group is not None and num_rows:
        dist.all_reduce(dx_RD, group=options.group)  # now summed over the whole vocabulary
    return sum_rows(dx_RD, inputs.row_R, like=inputs.hidden_TD), dweight_VD


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
