"""Log-probabilities of chosen tokens straight from hidden states: the (R, V) logits are never kept.

Legend: T packed tokens, R response rows, D hidden, V vocabulary columns of this rank.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nova_kernels.backend import resolve
from nova_kernels.checks import check_dtype, check_same_device, check_shape
from nova_kernels.linear_logprob import reference
from nova_kernels.linear_logprob.reference import Options, RowGradients, RowState

__all__ = ["IGNORE_TARGET", "LinearLogprob", "linear_logprob"]

IGNORE_TARGET = -100
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLANS = ("auto", "recompute", "store")


class LinearLogprob(NamedTuple):
    """Per row, in nats and logits; fp32 (fp64 for fp64 inputs). None: not asked for."""

    logp_R: Tensor
    entropy_R: Tensor | None
    max_logit_R: Tensor | None


def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    row_R: Tensor,
    target_R: Tensor,
    *,
    vocab_size: int | None = None,
    normalize_weight: bool = False,
    temperature: float = 1.0,
    return_entropy: bool = False,
    return_max_logit: bool = False,
    tp_group: dist.ProcessGroup | None = None,
    plan: str = "auto",
    workspace_mib: int = 256,
    backend: str = "auto",
) -> LinearLogprob:
    """Log-probability of each row's target token under the output layer's softmax.

    z[r] = hidden[row[r]] @ weight.T / temperature
    logp[r] = z[r, target[r]] - logsumexp_v z[r, v]
    entropy[r] = -sum_v p[r, v] log p[r, v]        max_logit[r] = max_v z[r, v]

    Args:     hidden_TD (T, D), weight_VD (V, D): bf16|fp16|fp32|fp64; under tp_group the rank's
              shard (V/tp, D), in rank order. row_R (R,) int64 in [0, T): any order, repeats
              allowed. target_R (R,) int64 in [0, vocab_size), or -100: that row gives 0
              everywhere and no gradient. Under tp_group all ranks pass the same hidden_TD, row_R
              and target_R.
              vocab_size: valid columns of the whole vocabulary, None: all; later ones are -inf.
              normalize_weight: rows of weight divided by their length (NormHead).
              plan: "recompute" (8 R D V FLOPs, constant workspace), "store" (6 R D V FLOPs, keeps
              R * V fp32 values until backward) or "auto" (store if they fit workspace_mib).
    Returns:  LinearLogprob(logp_R, entropy_R | None, max_logit_R | None), fp32 (fp64 inputs: fp64).
    Gradients: hidden_TD, weight_VD, from all three outputs, for any upstream gradient; accumulated
              in fp32 and rounded once to the input's dtype. A tied maximum passes its gradient to
              the first column. dhidden_TD is already summed over tp_group; dweight_VD is the
              shard's. Bit-identical from run to run. No double backward.
    Collectives: over tp_group, forward: one all-gather of (max, sum, target logit) per row, and one
              more value for each option; backward: one all-reduce of (R, D) fp32. None if R = 0.
    Memory:   workspace_mib + O(R * D) beyond inputs and gradients; the entropy takes up to three
              such workspaces; store adds R * V fp32.
    Raises:   ValueError for shapes, dtypes, devices, options; for values in row_R and target_R on a
              CPU only: on a GPU that would stop the stream, and a target out of range gives -inf.
    """
    resolve("linear_logprob", backend, ("reference",))
    _check_tensors(hidden_TD, weight_VD, row_R, target_R)
    num_ranks = 1 if tp_group is None else tp_group.size()
    vocab_size = weight_VD.shape[0] * num_ranks if vocab_size is None else vocab_size
    _check_options(weight_VD, num_ranks, vocab_size, temperature, plan, workspace_mib)
    _check_values(hidden_TD, row_R, target_R, vocab_size)

    needs_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    first_column = 0 if tp_group is None else tp_group.rank() * weight_VD.shape[0]
    options = Options(
        first_column=first_column,
        num_columns=min(max(vocab_size - first_column, 0), weight_VD.shape[0]),
        normalize=normalize_weight,
        temperature=float(temperature),
        with_entropy=return_entropy,
        with_argmax=return_max_logit and needs_grad,
        workspace_bytes=workspace_mib << 20,
        group=tp_group if num_ranks > 1 else None,
    )
    if needs_grad:
        store = _stores(plan, hidden_TD, weight_VD, row_R, options.workspace_bytes)
        parts = _LinearLogprob.apply(hidden_TD, weight_VD, row_R, target_R, options, store)
        logp_R, entropy_R, max_logit_R = parts
    else:
        ignored_R, x_RD = _gather(hidden_TD, row_R, target_R)
        state, _ = reference.forward(x_RD, weight_VD, target_R, options, store=False)
        logp_R, entropy_R, max_logit_R = reference.outputs(state, ignored_R)
    return LinearLogprob(
        logp_R, entropy_R if return_entropy else None, max_logit_R if return_max_logit else None
    )


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        row_R: Tensor,
        target_R: Tensor,
        options: Options,
        store: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        ignored_R, x_RD = _gather(hidden_TD, row_R, target_R)
        state, stored_RV = reference.forward(x_RD, weight_VD, target_R, options, store=store)
        ctx.save_for_backward(x_RD, weight_VD, row_R, target_R, stored_RV, *state)
        ctx.options = options
        ctx.hidden_shape, ctx.hidden_dtype = hidden_TD.shape, hidden_TD.dtype
        ctx.set_materialize_grads(False)  # an unused output then costs nothing in backward
        return reference.outputs(state, ignored_R)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (once_differentiable's type)
        ctx: Any, *douts: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_RD, weight_VD, row_R, target_R, stored_RV, *parts = ctx.saved_tensors
        state = RowState(*parts)
        if stored_RV is not None:
            stored_RV = stored_RV.data  # written and restored, which is no new version to autograd
        ignored_R = target_R == IGNORE_TARGET

        def of_counted_rows(gradient_R: Tensor | None) -> Tensor | None:
            return None if gradient_R is None else gradient_R.masked_fill(ignored_R, 0.0)

        dlogp_R, dentropy_R, dmax_logit_R = douts
        dlogp_R = torch.zeros_like(state.max_R) if dlogp_R is None else dlogp_R
        gradients = RowGradients(
            dlogp_R.masked_fill(ignored_R, 0.0),
            of_counted_rows(dentropy_R),
            of_counted_rows(dmax_logit_R),
        )
        dx_RD, dweight_VD = reference.backward(
            x_RD,
            weight_VD,
            target_R,
            state,
            stored_RV,
            gradients,
            options=ctx.options,
            needs_dx=ctx.needs_input_grad[0],
            needs_dweight=ctx.needs_input_grad[1],
        )
        dhidden_TD = None
        if dx_RD is not None:
            dhidden_TD = reference.scatter_rows(dx_RD, row_R, ctx.hidden_shape[0])
            dhidden_TD = dhidden_TD.to(ctx.hidden_dtype)
        return dhidden_TD, dweight_VD, None, None, None, None


def _gather(hidden_TD: Tensor, row_R: Tensor, target_R: Tensor) -> tuple[Tensor, Tensor]:
    """(ignored_R, x_RD): the rows; ignored ones are zeros, so that a NaN in padding stays there."""
    ignored_R = target_R == IGNORE_TARGET
    x_RD = hidden_TD.index_select(0, row_R).masked_fill_(ignored_R[:, None], 0.0)
    return ignored_R, x_RD


def _stores(
    plan: str, hidden_TD: Tensor, weight_VD: Tensor, row_R: Tensor, workspace_bytes: int
) -> bool:
    itemsize = reference.compute_dtype(hidden_TD, weight_VD).itemsize
    fits = row_R.shape[0] * weight_VD.shape[0] * itemsize <= workspace_bytes
    return plan == "store" or (plan == "auto" and fits)


def _check_tensors(hidden_TD: Tensor, weight_VD: Tensor, row_R: Tensor, target_R: Tensor) -> None:
    check_shape("hidden_TD", hidden_TD, ("T", "D"))
    check_shape("weight_VD", weight_VD, ("V", hidden_TD.shape[1]))
    check_shape("row_R", row_R, ("R",))
    check_shape("target_R", target_R, (row_R.shape[0],))
    check_dtype("hidden_TD", hidden_TD, FLOATS)
    check_dtype("weight_VD", weight_VD, FLOATS)
    check_dtype("row_R", row_R, (torch.int64,))
    check_dtype("target_R", target_R, (torch.int64,))
    check_same_device(hidden_TD=hidden_TD, weight_VD=weight_VD, row_R=row_R, target_R=target_R)


def _check_options(
    weight_VD: Tensor,
    num_ranks: int,
    vocab_size: int,
    temperature: float,
    plan: str,
    workspace_mib: int,
) -> None:
    num_columns = weight_VD.shape[0] * num_ranks
    if not 1 <= vocab_size <= num_columns:
        raise ValueError(
            f"vocab_size is {vocab_size}, but must lie in [1, {num_columns}], the rows of "
            f"weight_VD over all {num_ranks} ranks. Pass the tokenizer's size, without padding."
        )
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ValueError(
            f"temperature is {temperature}, but must be positive and finite. "
            f"1.0 leaves the logits as they are."
        )
    if plan not in PLANS:
        raise ValueError(f"plan is {plan!r}, but must be one of {', '.join(PLANS)}.")
    if workspace_mib < 1:
        raise ValueError(
            f"workspace_mib is {workspace_mib}, but must be at least 1. The default is 256."
        )


def _check_values(hidden_TD: Tensor, row_R: Tensor, target_R: Tensor, vocab_size: int) -> None:
    if row_R.device.type != "cpu" or row_R.numel() == 0:
        return
    lowest, highest = (int(bound) for bound in row_R.aminmax())
    if lowest < 0 or highest >= hidden_TD.shape[0]:
        raise ValueError(
            f"row_R spans [{lowest}, {highest}], but must lie in [0, {hidden_TD.shape[0]}), the "
            f"rows of hidden_TD. Check that row_R belongs to this pack."
        )
    valid_R = (target_R >= 0) & (target_R < vocab_size) | (target_R == IGNORE_TARGET)
    if not bool(valid_R.all()):
        raise ValueError(
            f"target_R holds {int(target_R[~valid_R][0])}, but must lie in [0, {vocab_size}), or "
            f"be {IGNORE_TARGET} in rows to ignore. Check that tokenizer and vocab_size agree."
        )
