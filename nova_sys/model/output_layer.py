"""The output layer: log-probabilities of response rows instead of logits.

T packed tokens, R response rows, D hidden, V padded vocabulary (V/tp per rank).
It is a ColumnParallelLinear whose `forward` does all the work, so that Megatron's parameter-gather and gradient overlap,
which hook into the layer's forward and its weight, go on working.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from nova_kernels import linear_logprob
from nova_sys.model.context_parallel import joined, stretch


class _GatherRows(torch.autograd.Function):
    """Rows of a hidden state that is split by token over the group (sequence or context parallelism) -> all rows, on every rank.

    Only the wanted rows travel. Over tensor-parallel ranks the gradient arrives already summed (linear_logprob's contract), over
    `context`, whose ranks each use some of the rows, it is summed here; then each rank takes its own rows. Every rank holds all R
    rows for a moment: where nearly every token carries loss (SFT), context parallelism does not divide that memory, R * D values.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        row_R: torch.Tensor,
        group: dist.ProcessGroup,
        context: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        first = dist.get_rank(group) * hidden_TD.size(0)
        mine_R = (row_R >= first) & (row_R < first + hidden_TD.size(0))
        local_R = (row_R - first).clamp(
            0, hidden_TD.size(0) - 1
        )  # others' rows: any, they are masked
        ctx.save_for_backward(mine_R, local_R)
        ctx.shape, ctx.context = hidden_TD.shape, context
        rows_RD = hidden_TD.index_select(0, local_R).masked_fill_(~mine_R[:, None], 0)
        dist.all_reduce(
            rows_RD, group=group
        )  # every row has one owner: the sum is the concatenation, bit for bit
        return rows_RD

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (drows_RD,) = grads
        if ctx.context is not None:
            drows_RD = drows_RD.contiguous()
            dist.all_reduce(drows_RD, group=ctx.context)  # now complete: each row had one user
        mine_R, local_R = ctx.saved_tensors
        wide = torch.promote_types(drows_RD.dtype, torch.float32)  # many rows may meet in one
        dhidden_TD = torch.zeros(ctx.shape, dtype=wide, device=drows_RD.device)
        dhidden_TD.index_add_(0, local_R, drows_RD.to(wide).masked_fill(~mine_R[:, None], 0))
        return dhidden_TD.to(drows_RD.dtype), None, None, None


class LogprobOutputLayer(ColumnParallelLinear):
    """hidden, row_R, target_R -> logp_R (R,) fp32. Without targets: the rows' logits (R, vocab_size), for generation."""

    tp_group: dist.ProcessGroup  # pyright: ignore[reportIncompatibleVariableOverride]
    groups: ProcessGroupCollection
    vocab_size: int
    normalize_weight: bool
    backend: str

    @classmethod
    def adopt(
        cls,
        layer: ColumnParallelLinear,
        *,
        groups: ProcessGroupCollection,
        vocab_size: int,
        normalize_weight: bool,
        backend: str = "auto",
    ) -> LogprobOutputLayer:
        """Turns the output layer that GPTModel built into ours, keeping its weight, its group and its place in the model."""
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer.groups, layer.vocab_size = groups, vocab_size
        layer.normalize_weight, layer.backend = normalize_weight, backend
        return layer

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_SBD: torch.Tensor,
        row_R: torch.Tensor,
        target_R: torch.Tensor | None,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden_TD = hidden_SBD.squeeze(1)
        weight_VD = self.weight if weight is None else weight
        assert weight_VD is not None
        group = self.tp_group if self.tp_group.size() > 1 else None
        context = self.groups.cp if self.groups.cp.size() > 1 else None
        split_by = self._split_by(context)
        num_rows = row_R.numel()
        if split_by is not None:
            hidden_TD = _GatherRows.apply(hidden_TD, row_R, split_by, context)
            row_R = torch.arange(num_rows, device=row_R.device)
        if target_R is None:
            return self._logits(hidden_TD[row_R], weight_VD, group)
        if (
            context is not None
        ):  # each rank multiplies its share of the rows, wherever their tokens are
            ours = stretch(num_rows, context)
            row_R, target_R = row_R[ours], target_R[ours]
        logp_R = linear_logprob(
            hidden_TD,
            weight_VD,
            row_R,
            target_R,
            vocab_size=self.vocab_size,
            normalize_weight=self.normalize_weight,
            tp_group=group,
            backend=self.backend,
        ).logp_R
        return logp_R if context is None else joined(logp_R, num_rows, context)

    def _split_by(self, context: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        """The group over whose ranks the hidden state's tokens are split; None: over none."""
        if self.sequence_parallel and self.tp_group.size() > 1:
            return self.tp_group if context is None else self.groups.tp_cp
        return context

    def _logits(
        self, rows_RD: torch.Tensor, weight_VD: torch.Tensor, group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        if self.normalize_weight:
            weight_VD = torch.nn.functional.normalize(weight_VD.float(), dim=1).to(weight_VD.dtype)
        logits_RV = (rows_RD @ weight_VD.T).float()
        if group is not None:
            parts = [torch.empty_like(logits_RV) for _ in range(group.size())]
            dist.all_gather(
                parts, logits_RV.contiguous(), group=group
            )  # now every rank's slice of the vocabulary
            logits_RV = torch.cat(parts, dim=1)
        return logits_RV[:, : self.vocab_size]
