"""What the implementations of linear_logprob share: their arguments, and the state of softmax rows.

Legend: T packed tokens, R response rows, D hidden, V vocabulary columns of this rank,
        K disjoint sets of columns, C values per row and set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

IGNORE_TARGET = -100
NORM_EPS = 1e-12  # as in torch.nn.functional.normalize


class Inputs(NamedTuple):
    """The tensors of one call."""

    hidden_TD: Tensor
    weight_VD: Tensor
    row_R: Tensor
    target_R: Tensor

    @property
    def ignored_R(self) -> Tensor:
        return self.target_R == IGNORE_TARGET

    def gathered(self) -> Tensor:
        """The rows (R, D); ignored ones are zeros, so that a NaN in padding stays there."""
        x_RD = self.hidden_TD.index_select(0, self.row_R)
        return x_RD.masked_fill_(self.ignored_R[:, None], 0.0)


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


class RowState(NamedTuple):
    """Softmax state of each row over some columns; states of disjoint columns merge."""

    max_R: Tensor
    sum_R: Tensor  # sum of e = exp(z - max)
    target_R: Tensor  # the target's logit; -inf where the target is not among the columns
    moment_R: Tensor | None  # sum of e * (z - max), for the entropy
    argmax_R: (
        Tensor | None
    )  # global column of the maximum (exact: V < 2^24), the first one if several

    def entropy(self) -> Tensor:
        return self.sum_R.log() - present(self.moment_R) / self.sum_R


class RowGradients(NamedTuple):
    """Upstream gradients per row; None where an output was not used."""

    dlogp_R: Tensor
    dentropy_R: Tensor | None
    dmax_logit_R: Tensor | None


def outputs(state: RowState, ignored_R: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """(logp_R, entropy_R, max_logit_R) of a whole-vocabulary state; 0 in ignored rows."""
    # In this order: max and target may be huge, their difference small. sum >= 1, so logp <= 0.
    logp_R = state.target_R - state.max_R - state.sum_R.log()
    logp_R = logp_R.masked_fill_(ignored_R, 0.0)
    entropy_R = None
    if state.moment_R is not None:
        entropy_R = state.entropy().clamp_(min=0.0).masked_fill_(ignored_R, 0.0)
    return logp_R, entropy_R, state.max_R.masked_fill(ignored_R, 0.0)


def empty_state(num_rows: int, like: Tensor, options: Options) -> RowState:
    """The state over no columns, in the dtype and on the device of `like`."""
    lowest_R = like.new_full((num_rows,), -torch.inf)
    zero_R = torch.zeros_like(lowest_R)
    return RowState(
        lowest_R,
        zero_R,
        lowest_R,
        zero_R if options.with_entropy else None,
        zero_R if options.with_argmax else None,
    )


def stacked(states: list[RowState]) -> RowState:
    """The states of K sets of columns as one with parts (K, R)."""
    columns = zip(*states, strict=True)
    return RowState._make(None if parts[0] is None else torch.stack(parts) for parts in columns)


def merge(by_set: RowState) -> RowState:
    """One state from parts (K, R); splits, waves and ranks merge by the same rule, in their order."""
    max_KR, sum_KR, target_KR, moment_KR, argmax_KR = by_set
    if len(max_KR) == 1:
        return RowState._make(None if part is None else part[0] for part in by_set)
    max_R, winner_R = max_KR.max(dim=0)
    # A state over no columns has sum 0 and max -inf: its difference must not become NaN.
    diff_KR = torch.where(sum_KR == 0, 0.0, max_KR - max_R)
    scale_KR = diff_KR.exp()
    return RowState(
        max_R,
        (sum_KR * scale_KR).sum(dim=0),
        target_KR.amax(dim=0),
        None if moment_KR is None else ((moment_KR + diff_KR * sum_KR) * scale_KR).sum(dim=0),
        None if argmax_KR is None else argmax_KR.gather(0, winner_R[None])[0],
    )


def merge_over_ranks(state: RowState, group: dist.ProcessGroup) -> RowState:
    """The state over every rank's columns; one all-gather of 3 to 5 values per row."""
    if state.max_R.numel() == 0:
        return state
    names = [name for name, part in state._asdict().items() if part is not None]
    packed_CR = torch.stack([getattr(state, name) for name in names])
    gathered = packed_CR.new_empty(group.size() * len(packed_CR), packed_CR.shape[1])
    dist.all_gather_into_tensor(gathered, packed_CR, group=group)  # now every rank's states
    by_rank_KCR = gathered.view(group.size(), *packed_CR.shape)
    return merge(state._replace(**dict(zip(names, by_rank_KCR.unbind(1), strict=True))))


def present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
