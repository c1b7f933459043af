"""linear_logprob in plain PyTorch: the readable reference, and the fast path on a CPU.

The vocabulary is walked in waves of columns that hold all rows, so a wave's dW is complete after
one GEMM and only the small (R, D) gradient accumulates. Columns beyond `vocab_size` are never
multiplied, which is what a logit of -inf means.

Legend: T packed tokens, R response rows, D hidden, V vocabulary columns of this rank,
        W columns of one wave.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

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
    stacked,
)

MIN_WAVE = 64  # columns; fewer make no GEMM


def compute_dtype(inputs: Inputs) -> torch.dtype:
    """fp64 if any input is fp64, else fp32."""
    dtypes = (inputs.hidden_TD.dtype, inputs.weight_VD.dtype)
    return torch.float64 if torch.float64 in dtypes else torch.float32


def stored_bytes(inputs: Inputs) -> int:
    """What plan "store" keeps until backward."""
    return len(inputs.row_R) * len(inputs.weight_VD) * compute_dtype(inputs).itemsize


def column_waves(x_RD: Tensor, options: Options) -> list[tuple[int, int]]:
    """Column ranges whose (R, W) block, and the (W, D) copies beside it, fit the workspace.

    As wide as that allows, also on a CPU: blocks of cache size made no step faster there.
    """
    num_rows, hidden = x_RD.shape
    if num_rows == 0:
        return []
    width = options.workspace_bytes // (x_RD.element_size() * (num_rows + 2 * hidden))
    width = max(width, MIN_WAVE)
    return [
        (start, min(start + width, options.num_columns))
        for start in range(0, options.num_columns, width)
    ]


def forward(
    inputs: Inputs, options: Options, *, store: bool
) -> tuple[RowState, tuple[Tensor, ...]]:
    """Each row's state over the whole vocabulary; if `store`, exp(z - max) of our columns."""
    x_RD = _scaled_rows(inputs, options)
    waves = column_waves(x_RD, options)
    width = (
        options.num_columns if store else max((stop - start for start, stop in waves), default=0)
    )
    block_RW = torch.empty(x_RD.shape[0], width, dtype=x_RD.dtype, device=x_RD.device)
    states = []
    for start, stop in waves:
        weight_WD, _ = _weight_block(inputs.weight_VD, start, stop, x_RD.dtype, options.normalize)
        z_RW = block_RW[:, start:stop] if store else block_RW[:, : stop - start]
        torch.mm(x_RD, weight_WD.t(), out=z_RW)
        states.append(_fold(z_RW, inputs.target_R, options.first_column + start, options))
    total = merge(stacked(states)) if states else empty_state(len(x_RD), x_RD, options)
    if options.group is not None:
        total = merge_over_ranks(total, options.group)  # now over the whole vocabulary
    if not store:
        return total, ()
    if len(waves) > 1 or options.group is not None:
        for (start, stop), state in zip(waves, states, strict=True):
            block_RW[:, start:stop].mul_((state.max_R - total.max_R).exp_()[:, None])
    return total, (block_RW,)


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
    weight_VD, target_R = inputs.weight_VD, inputs.target_R
    x_RD = _scaled_rows(inputs, options)
    # Written and restored, which is no new version to autograd.
    stored_RV = stored[0].data if stored else None
    only_logp = gradients.dentropy_R is None and gradients.dmax_logit_R is None
    # For logp alone dz = scale * (e - sum * onehot): scale rows of x and of dx, never the block.
    scale_R = -gradients.dlogp_R / state.sum_R if only_logp else None
    left_RD = x_RD if scale_R is None else x_RD * scale_R[:, None]
    dx_RD = torch.zeros_like(x_RD) if needs_dhidden else None
    dweight_VD = torch.empty_like(weight_VD) if needs_dweight else None
    if dweight_VD is not None:  # without rows there are no waves that would fill it
        dweight_VD[options.num_columns if len(x_RD) else 0 :].zero_()
    for e_RW, weight_WD, inverse_norm_W, start in _exp_blocks(
        x_RD, weight_VD, state, stored_RV, options
    ):
        first_column = options.first_column + start
        kept_R1 = None
        if only_logp:
            dz_RW, kept_R1 = e_RW, _subtract_at(e_RW, target_R - first_column, state.sum_R)
        else:
            dz_RW = _dlogits(e_RW, target_R, first_column, state, gradients)
        if dx_RD is not None:
            dx_RD.addmm_(dz_RW, weight_WD)
        if dweight_VD is not None:
            out_WD = dweight_VD[start : start + len(weight_WD)]
            _weight_gradient(dz_RW, left_RD, weight_WD, inverse_norm_W, out=out_WD)
        if kept_R1 is not None and stored_RV is not None:  # a second backward finds it as it was
            e_RW.scatter_(1, _clamped(target_R - first_column, e_RW), kept_R1)
    if dx_RD is None:
        return None, dweight_VD
    if scale_R is not None:
        dx_RD.mul_(scale_R[:, None])
    if options.temperature != 1.0:
        dx_RD.div_(options.temperature)
    if options.group is not None and len(dx_RD):
        dist.all_reduce(dx_RD, group=options.group)  # now summed over the whole vocabulary
    return _scatter_rows(dx_RD, inputs), dweight_VD


def _scatter_rows(dx_RD: Tensor, inputs: Inputs) -> Tensor:
    """Sums rows into their tokens (T, D), deterministically; a row may occur several times."""
    dhidden_TD = dx_RD.new_zeros(inputs.hidden_TD.shape)
    if dx_RD.is_cuda:  # index_add_ is atomic there, index_put_ sorts
        dhidden_TD.index_put_((inputs.row_R,), dx_RD, accumulate=True)
    else:  # in order, and 14x faster than index_put_
        dhidden_TD.index_add_(0, inputs.row_R, dx_RD)
    return dhidden_TD.to(inputs.hidden_TD.dtype)


def _scaled_rows(inputs: Inputs, options: Options) -> Tensor:
    """The gathered rows / temperature, in the compute dtype."""
    x_RD = inputs.gathered().to(compute_dtype(inputs))
    return x_RD if options.temperature == 1.0 else x_RD / options.temperature


def _weight_block(
    weight_VD: Tensor, start: int, stop: int, dtype: torch.dtype, normalize: bool
) -> tuple[Tensor, Tensor | None]:
    """Rows [start, stop) as the GEMM takes them, and 1 / norm of each when normalised."""
    weight_WD = weight_VD[start:stop].to(dtype)
    if not normalize:
        return weight_WD, None
    inverse_norm_W = torch.linalg.vector_norm(weight_WD, dim=1).clamp_(min=NORM_EPS).reciprocal_()
    return weight_WD * inverse_norm_W[:, None], inverse_norm_W


def _exp_blocks(
    x_RD: Tensor, weight_VD: Tensor, state: RowState, stored_RV: Tensor | None, options: Options
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, int]]:
    """Per wave: exp(z - max), stored or recomputed; weight block, its 1 / norm; first column."""
    waves = column_waves(x_RD, options)
    width = max((stop - start for start, stop in waves), default=0)
    scratch_RW = None if stored_RV is not None else x_RD.new_empty(len(x_RD), width)
    for start, stop in waves:
        weight_WD, inverse_norm_W = _weight_block(
            weight_VD, start, stop, x_RD.dtype, options.normalize
        )
        if stored_RV is not None:
            e_RW = stored_RV[:, start:stop]
        else:
            assert scratch_RW is not None
            e_RW = scratch_RW[:, : stop - start]
            torch.mm(x_RD, weight_WD.t(), out=e_RW)
            e_RW.sub_(state.max_R[:, None]).exp_()
        yield e_RW, weight_WD, inverse_norm_W, start


def _fold(z_RW: Tensor, target_R: Tensor, first_column: int, options: Options) -> RowState:
    """State over one block of logits, which becomes exp(z - max) in place."""
    argmax_R = moment_R = None
    if options.with_argmax:
        max_R, index_R = z_RW.max(dim=1)
        argmax_R = (index_R + first_column).to(z_RW.dtype)
    else:
        max_R = z_RW.amax(dim=1)
    local_R = target_R - first_column
    logit_R = z_RW.gather(1, _clamped(local_R, z_RW))[:, 0]
    logit_R = logit_R.masked_fill_(~_inside(local_R, z_RW), -torch.inf)
    # In a block of -inf alone the differences would be NaN; its sum must be 0.
    z_RW.sub_(max_R.masked_fill(max_R == -torch.inf, 0.0)[:, None])
    if options.with_entropy:
        shifted_RW = z_RW.clone()
        z_RW.exp_()
        moment_R = shifted_RW.mul_(z_RW).sum(dim=1)
    else:
        z_RW.exp_()
    return RowState(max_R, z_RW.sum(dim=1), logit_R, moment_R, argmax_R)


def _dlogits(
    e_RW: Tensor, target_R: Tensor, first_column: int, state: RowState, gradients: RowGradients
) -> Tensor:
    """dz = g (onehot_target - p) - h p (log p + entropy) + k onehot_argmax, as a new block."""
    p_RW = e_RW / state.sum_R[:, None]
    if gradients.dentropy_R is None:
        dz_RW = p_RW.mul_(-gradients.dlogp_R[:, None])
    else:
        p_log_p_RW = torch.xlogy(p_RW, p_RW)  # 0 where p underflowed
        weight_R = gradients.dlogp_R + gradients.dentropy_R * state.entropy()
        dz_RW = p_RW.mul_(-weight_R[:, None])
        dz_RW.addcmul_(p_log_p_RW, gradients.dentropy_R[:, None], value=-1.0)
    _subtract_at(dz_RW, target_R - first_column, -gradients.dlogp_R)
    if gradients.dmax_logit_R is not None:
        argmax_R = present(state.argmax_R).long()
        _subtract_at(dz_RW, argmax_R - first_column, -gradients.dmax_logit_R)
    return dz_RW


def _weight_gradient(
    dz_RW: Tensor, left_RD: Tensor, weight_WD: Tensor, inverse_norm_W: Tensor | None, *, out: Tensor
) -> None:
    """out = dz^T @ left, through the normalisation if there is one, rounded once."""
    if inverse_norm_W is None and out.dtype == dz_RW.dtype:
        torch.mm(dz_RW.t(), left_RD, out=out)
        return
    dweight_WD = torch.mm(dz_RW.t(), left_RD)
    if inverse_norm_W is not None:  # remove the part along the unit row, which its norm cannot feel
        along_W1 = (dweight_WD * weight_WD).sum(dim=1, keepdim=True)
        dweight_WD.addcmul_(weight_WD, along_W1, value=-1.0).mul_(inverse_norm_W[:, None])
    out.copy_(dweight_WD)


def _inside(index_R: Tensor, block_RW: Tensor) -> Tensor:
    return (index_R >= 0) & (index_R < block_RW.shape[1])


def _clamped(index_R: Tensor, block_RW: Tensor) -> Tensor:
    return index_R.clamp(0, block_RW.shape[1] - 1)[:, None]


def _subtract_at(block_RW: Tensor, index_R: Tensor, value_R: Tensor) -> Tensor:
    """block[r, index[r]] -= value[r] where the index lies in the block; the old entries (R, 1)."""
    column_R1 = _clamped(index_R, block_RW)
    kept_R1 = block_RW.gather(1, column_R1)
    new_R1 = torch.where(_inside(index_R, block_RW)[:, None], kept_R1 - value_R[:, None], kept_R1)
    block_RW.scatter_(1, column_R1, new_R1)
    return kept_R1
