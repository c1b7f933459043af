"""linear_logprob in plain PyTorch: the readable reference, and the fast path on a CPU.

The vocabulary is walked in waves of columns that hold all rows, so a wave's dW is complete after
one GEMM and only the small (R, D) gradient accumulates. Columns beyond `vocab_size` are never
multiplied, which is what a logit of -inf means.

Legend: T packed tokens, R response rows, D hidden, V vocabulary columns of this rank,
        W columns of one wave, K disjoint sets of columns, C values per row and set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

NORM_EPS = 1e-12  # as in torch.nn.functional.normalize
MIN_WAVE = 64  # columns; fewer make no GEMM


@dataclass(frozen=True)
class Options:
    """The values of one call that are no tensors."""

    first_column: int  # global index of this rank's first column
    num_columns: int  # valid columns of this rank; those behind count as -inf
    normalize: bool
    temperature: float
    with_entropy: bool
    with_argmax: bool
    workspace_bytes: int
    group: dist.ProcessGroup | None

    def waves(self, x_RD: Tensor) -> list[tuple[int, int]]:
        """Column ranges whose (R, W) block, and the (W, D) copies beside it, fit the workspace.

        As wide as that allows, also on a CPU: blocks of cache size made no step faster there.
        """
        num_rows, hidden = x_RD.shape
        if num_rows == 0:
            return []
        width = self.workspace_bytes // (x_RD.element_size() * (num_rows + 2 * hidden))
        width = max(width, MIN_WAVE)
        return [
            (start, min(start + width, self.num_columns))
            for start in range(0, self.num_columns, width)
        ]


class RowState(NamedTuple):
    """Softmax state of each row over some columns; states of disjoint columns merge."""

    max_R: Tensor
    sum_R: Tensor  # sum of e = exp(z - max)
    target_R: Tensor  # the target's logit; -inf where the target is not among the columns
    moment_R: Tensor | None  # sum of e * (z - max), for the entropy
    argmax_R: (
        Tensor | None
    )  # global column of the maximum (exact: V < 2^24), the first one if several


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any input is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def forward(
    x_RD: Tensor, weight_VD: Tensor, target_R: Tensor, options: Options, *, store: bool
) -> tuple[RowState, Tensor | None]:
    """Each row's state over the whole vocabulary; if `store`, exp(z - max) of our columns."""
    x_RD = _scaled(x_RD, weight_VD, options)
    waves = options.waves(x_RD)
    width = (
        options.num_columns if store else max((stop - start for start, stop in waves), default=0)
    )
    block_RW = torch.empty(x_RD.shape[0], width, dtype=x_RD.dtype, device=x_RD.device)
    states = []
    for start, stop in waves:
        weight_WD, _ = _weight_block(weight_VD, start, stop, x_RD.dtype, options.normalize)
        z_RW = block_RW[:, start:stop] if store else block_RW[:, : stop - start]
        torch.mm(x_RD, weight_WD.t(), out=z_RW)
        states.append(_fold(z_RW, target_R, options.first_column + start, options))
    total = _merge(states) if states else _empty_state(x_RD, options)
    if options.group is not None:
        total = _merge_over_ranks(total, options.group)  # now over the whole vocabulary
    if not store:
        return total, None
    if len(waves) > 1 or options.group is not None:
        for (start, stop), state in zip(waves, states, strict=True):
            block_RW[:, start:stop].mul_((state.max_R - total.max_R).exp_()[:, None])
    return total, block_RW


def outputs(state: RowState, ignored_R: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """(logp_R, entropy_R, max_logit_R) of a whole-vocabulary state; 0 in ignored rows."""
    log_sum_R = state.sum_R.log()
    # In this order: max and target may be huge, their difference small. sum >= 1, so logp <= 0.
    logp_R = (state.target_R - state.max_R - log_sum_R).masked_fill_(ignored_R, 0.0)
    entropy_R = None
    if state.moment_R is not None:
        entropy_R = log_sum_R - state.moment_R / state.sum_R
        entropy_R = entropy_R.clamp_(min=0.0).masked_fill_(ignored_R, 0.0)
    return logp_R, entropy_R, state.max_R.masked_fill(ignored_R, 0.0)


class RowGradients(NamedTuple):
    """Upstream gradients per row; None where an output was not used."""

    dlogp_R: Tensor
    dentropy_R: Tensor | None
    dmax_logit_R: Tensor | None


def backward(
    x_RD: Tensor,
    weight_VD: Tensor,
    target_R: Tensor,
    state: RowState,
    stored_RV: Tensor | None,
    gradients: RowGradients,
    *,
    options: Options,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx_RD in the compute dtype, summed over the group; dweight_VD in the weight's dtype)."""
    x_RD = _scaled(x_RD, weight_VD, options)
    only_logp = gradients.dentropy_R is None and gradients.dmax_logit_R is None
    # For logp alone dz = scale * (e - sum * onehot): scale rows of x and of dx, never the block.
    scale_R = -gradients.dlogp_R / state.sum_R if only_logp else None
    left_RD = x_RD if scale_R is None else x_RD * scale_R[:, None]
    dx_RD = torch.zeros_like(x_RD) if needs_dx else None
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
    return dx_RD, dweight_VD


def scatter_rows(dx_RD: Tensor, row_R: Tensor, num_tokens: int) -> Tensor:
    """Sums rows into their tokens (T, D), deterministically; a row may occur several times."""
    dhidden_TD = dx_RD.new_zeros(num_tokens, dx_RD.shape[1])
    if dx_RD.is_cuda:  # index_add_ is atomic there, index_put_ sorts
        return dhidden_TD.index_put_((row_R,), dx_RD, accumulate=True)
    return dhidden_TD.index_add_(
        0, row_R, dx_RD
    )  # on a CPU in order, and 14x faster than index_put_


def _scaled(x_RD: Tensor, weight_VD: Tensor, options: Options) -> Tensor:
    """x / temperature in the compute dtype; x itself when that changes nothing."""
    x_RD = x_RD.to(compute_dtype(x_RD, weight_VD))
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
    waves = options.waves(x_RD)
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
    z_RW.sub_(max_R[:, None])
    if options.with_entropy:
        shifted_RW = z_RW.clone()
        z_RW.exp_()
        moment_R = shifted_RW.mul_(z_RW).sum(dim=1)
    else:
        z_RW.exp_()
    return RowState(max_R, z_RW.sum(dim=1), logit_R, moment_R, argmax_R)


def _empty_state(x_RD: Tensor, options: Options) -> RowState:
    """The state over no columns."""
    lowest_R = x_RD.new_full((len(x_RD),), -torch.inf)
    zero_R = torch.zeros_like(lowest_R)
    return RowState(
        lowest_R,
        zero_R,
        lowest_R,
        zero_R if options.with_entropy else None,
        zero_R if options.with_argmax else None,
    )


def _merge(states: Sequence[RowState]) -> RowState:
    """One state over the columns of all; waves and ranks merge by the same rule, in their order."""
    if len(states) == 1:
        return states[0]
    max_KR = torch.stack([state.max_R for state in states])
    sum_KR = torch.stack([state.sum_R for state in states])
    max_R, winner_R = max_KR.max(dim=0)
    # A state over no columns has sum 0 and max -inf: its difference must not become NaN.
    diff_KR = torch.where(sum_KR == 0, 0.0, max_KR - max_R)
    scale_KR = diff_KR.exp()
    moment_R = argmax_R = None
    if states[0].moment_R is not None:
        moment_KR = torch.stack([_present(state.moment_R) for state in states])
        moment_R = ((moment_KR + diff_KR * sum_KR) * scale_KR).sum(dim=0)
    if states[0].argmax_R is not None:
        argmax_KR = torch.stack([_present(state.argmax_R) for state in states])
        argmax_R = argmax_KR.gather(0, winner_R[None])[0]
    target_R = torch.stack([state.target_R for state in states]).amax(dim=0)
    return RowState(max_R, (sum_KR * scale_KR).sum(dim=0), target_R, moment_R, argmax_R)


def _merge_over_ranks(state: RowState, group: dist.ProcessGroup) -> RowState:
    """The state over every rank's columns; one all-gather of 3 to 5 values per row."""
    if state.max_R.numel() == 0:
        return state
    names = [name for name, part in state._asdict().items() if part is not None]
    packed_CR = torch.stack([getattr(state, name) for name in names])
    gathered = packed_CR.new_empty(group.size() * len(packed_CR), packed_CR.shape[1])
    dist.all_gather_into_tensor(gathered, packed_CR, group=group)  # now every rank's states
    by_rank = gathered.view(group.size(), *packed_CR.shape)
    return _merge(
        [state._replace(**dict(zip(names, part_CR.unbind(), strict=True))) for part_CR in by_rank]
    )


def _dlogits(
    e_RW: Tensor, target_R: Tensor, first_column: int, state: RowState, gradients: RowGradients
) -> Tensor:
    """dz = g (onehot_target - p) - h p (log p + entropy) + k onehot_argmax, as a new block."""
    p_RW = e_RW / state.sum_R[:, None]
    if gradients.dentropy_R is None:
        dz_RW = p_RW.mul_(-gradients.dlogp_R[:, None])
    else:
        entropy_R = state.sum_R.log() - _present(state.moment_R) / state.sum_R
        p_log_p_RW = torch.xlogy(p_RW, p_RW)  # 0 where p underflowed
        weight_R = gradients.dlogp_R + gradients.dentropy_R * entropy_R
        dz_RW = p_RW.mul_(-weight_R[:, None])
        dz_RW.addcmul_(p_log_p_RW, gradients.dentropy_R[:, None], value=-1.0)
    _subtract_at(dz_RW, target_R - first_column, -gradients.dlogp_R)
    if gradients.dmax_logit_R is not None:
        argmax_R = _present(state.argmax_R).long()
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


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
