"""Log-probabilities of chosen tokens straight from hidden states: the (R, V) logits are never kept.

Legend: T packed tokens, R response rows, D hidden, V vocabulary columns of this rank.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nova_kernels.backend import cuda_runs_on, resolve, triton_runs_on
from nova_kernels.checks import check_dtype, check_same_device, check_shape
from nova_kernels.linear_logprob import reference
from nova_kernels.linear_logprob.state import (
    IGNORE_TARGET,
    Inputs,
    Options,
    RowGradients,
    RowState,
    outputs,
)
from nova_kernels.ranges import ranged

__all__ = ["IGNORE_TARGET", "LinearLogprob", "linear_logprob"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLANS = ("auto", "recompute", "store")


class LinearLogprob(NamedTuple):
    """Per row, in nats and logits; fp32 (fp64 for fp64 inputs). None: not asked for."""

    logp_R: Tensor
    entropy_R: Tensor | None
    max_logit_R: Tensor | None


@ranged("nova_kernels.linear_logprob")
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
    inputs = Inputs(hidden_TD, weight_VD, row_R, target_R)
    implementation = _implementation(inputs, backend)
    if needs_grad:
        fits = implementation.stored_bytes(inputs) <= options.workspace_bytes
        store = plan == "store" or (plan == "auto" and fits)
        logp_R, entropy_R, max_logit_R = _LinearLogprob.apply(
            *inputs, implementation, options, store
        )
    else:
        with torch.autocast(hidden_TD.device.type, enabled=False):
            state, _ = implementation.forward(inputs, options, store=False)
        logp_R, entropy_R, max_logit_R = outputs(state, inputs.ignored_R)
    return LinearLogprob(
        logp_R, entropy_R if return_entropy else None, max_logit_R if return_max_logit else None
    )


def _implementation(inputs: Inputs, backend: str) -> ModuleType:
    """The module whose forward and backward run; "auto" is the reference until the GPU tests of one have passed."""
    broken = {"triton": _broken_triton_rule(inputs), "cuda": _broken_cuda_rule(inputs)}
    available = ["reference", *(name for name, rule in broken.items() if not rule)]
    chosen = resolve("linear_logprob", backend, available, why=broken.get(backend, ""))
    if chosen == "reference":
        return reference
    if chosen == "cuda":
        from nova_kernels.linear_logprob import _cuda  # needs triton

        return _cuda
    from nova_kernels.linear_logprob import _triton  # needs triton

    return _triton


def _broken_triton_rule(inputs: Inputs) -> str:
    """The rule of the Triton kernels that these inputs break, or an empty string."""
    hidden_TD, weight_VD = inputs.hidden_TD, inputs.weight_VD
    if not triton_runs_on(hidden_TD.device):
        return "triton needs a CUDA device, or TRITON_INTERPRET=1, and its package"
    if hidden_TD.is_cuda and torch.cuda.get_device_capability(hidden_TD.device) < (9, 0):
        return "triton needs a GPU with a tensor memory accelerator (Hopper or newer)"
    if hidden_TD.dtype != weight_VD.dtype or hidden_TD.dtype == torch.float64:
        return "triton needs hidden_TD and weight_VD both in bf16, fp16 or fp32"
    return _broken_layout_rule("triton", inputs)


def _broken_cuda_rule(inputs: Inputs) -> str:
    """The rule of the CUDA kernels that these inputs break, or an empty string."""
    if not cuda_runs_on(inputs.hidden_TD.device):
        return "cuda needs a Hopper GPU (sm_90), and an extension that was built with nvcc"
    if not triton_runs_on(inputs.hidden_TD.device):
        return "cuda needs Triton's package, for its passes over rows"
    if not inputs.hidden_TD.dtype == inputs.weight_VD.dtype == torch.bfloat16:
        return "cuda needs hidden_TD and weight_VD both in bf16"
    return _broken_layout_rule("cuda", inputs)


def _broken_layout_rule(backend: str, inputs: Inputs) -> str:
    hidden_TD, weight_VD = inputs.hidden_TD, inputs.weight_VD
    if not (hidden_TD.is_contiguous() and weight_VD.is_contiguous()):
        return f"{backend} needs hidden_TD and weight_VD contiguous"
    starts = (hidden_TD.data_ptr(), weight_VD.data_ptr(), hidden_TD[:1].nbytes)
    if any(start % 16 for start in starts):
        return (
            f"{backend} needs rows of hidden_TD and weight_VD that start at multiples of 16 bytes"
        )
    return ""


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        row_R: Tensor,
        target_R: Tensor,
        implementation: ModuleType,
        options: Options,
        store: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        inputs = Inputs(hidden_TD, weight_VD, row_R, target_R)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            state, stored = implementation.forward(inputs, options, store=store)
        ctx.save_for_backward(*inputs, *state, *stored)
        ctx.implementation, ctx.options = implementation, options
        ctx.set_materialize_grads(False)  # an unused output then costs nothing in backward
        return outputs(state, inputs.ignored_R)

    @staticmethod
    @once_differentiable
    @ranged("nova_kernels.linear_logprob.backward")
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (once_differentiable's type)
        ctx: Any, *douts: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, state, stored = Inputs(*saved[:4]), RowState(*saved[4:9]), saved[9:]
        ignored_R = inputs.ignored_R

        def of_counted_rows(gradient_R: Tensor | None) -> Tensor | None:
            return None if gradient_R is None else gradient_R.masked_fill(ignored_R, 0.0)

        dlogp_R, dentropy_R, dmax_logit_R = douts
        dlogp_R = torch.zeros_like(state.max_R) if dlogp_R is None else dlogp_R
        gradients = RowGradients(
            dlogp_R.masked_fill(ignored_R, 0.0),
            of_counted_rows(dentropy_R),
            of_counted_rows(dmax_logit_R),
        )
        with torch.autocast(inputs.hidden_TD.device.type, enabled=False):
            dhidden_TD, dweight_VD = ctx.implementation.backward(
                inputs,
                state,
                stored,
                gradients,
                ctx.options,
                needs_dhidden=ctx.needs_input_grad[0],
                needs_dweight=ctx.needs_input_grad[1],
            )
        return dhidden_TD, dweight_VD, None, None, None, None, None


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
