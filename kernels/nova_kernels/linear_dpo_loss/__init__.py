"""The preference loss straight from hidden states: output layer, log-probs, sums and loss in one.

Legend: T packed tokens, R response rows, D hidden, V vocabulary columns of this rank,
        S sequences (2p chosen, 2p + 1 rejected of pair p), P preference pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nova_kernels.checks import check_dtype, check_same_device, check_shape
from nova_kernels.linear_logprob import IGNORE_TARGET, linear_logprob
from nova_kernels.preference_loss import preference_loss

__all__ = ["LinearDpoLoss", "linear_dpo_loss"]


@dataclass(frozen=True)
class LinearDpoLoss:
    """A sum and its count, divided once by the global count; the rest is for metrics, detached."""

    loss_sum: Tensor  # (), over the pairs
    num_pairs: int
    margin_P: Tensor
    logp_S: Tensor  # sums over each sequence's rows, nats
    num_tokens_S: Tensor  # int64, without ignored rows


def linear_dpo_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    row_R: Tensor,
    target_R: Tensor,
    sequence_R: Tensor,
    ref_logp_S: Tensor,
    *,
    beta: float,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalize: bool = False,
    nll_weight: float = 0.0,
    reference_free: bool = False,
    target_margin: float = 0.0,
    vocab_size: int | None = None,
    normalize_weight: bool = False,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    plan: str = "auto",
    workspace_mib: int = 256,
    backend: str = "auto",
) -> LinearDpoLoss:
    """Sum of the preference losses of all pairs of a pack.

    logp[s] = sum over r with sequence[r] = s of linear_logprob(...)[r]
    loss_sum = sum over p of preference_loss(logp[2p], logp[2p + 1], ...)    (arXiv 2305.18290)

    Args:     the first four and vocab_size ... backend: as in linear_logprob. sequence_R (R,) int64
              in [0, S), in any order: 2p is the chosen, 2p + 1 the rejected response of pair p.
              ref_logp_S (S,) fp32|fp64, S even; its values are not read if reference_free.
              beta ... target_margin: as in preference_loss.
    Returns:  LinearDpoLoss(loss_sum, num_pairs, margin_P, logp_S, num_tokens_S). Without rows or
              pairs the sum is 0 and still part of the graph.
    Gradients: hidden_TD, weight_VD, from loss_sum.   Collectives, Memory: linear_logprob's.
    Raises:   ValueError for shapes, dtypes, devices and options; for values in the index tensors on
              a CPU only.
    """
    check_shape("sequence_R", sequence_R, (row_R.shape[0],))
    check_shape("ref_logp_S", ref_logp_S, ("S",))
    check_dtype("sequence_R", sequence_R, (torch.int64,))
    check_same_device(hidden_TD=hidden_TD, sequence_R=sequence_R, ref_logp_S=ref_logp_S)
    num_sequences = ref_logp_S.shape[0]
    _check_sequences(sequence_R, num_sequences)
    logp_R, _, _ = linear_logprob(
        hidden_TD,
        weight_VD,
        row_R,
        target_R,
        vocab_size=vocab_size,
        normalize_weight=normalize_weight,
        temperature=temperature,
        tp_group=tp_group,
        plan=plan,
        workspace_mib=workspace_mib,
        backend=backend,
    )
    logp_S = _sum_by_sequence(logp_R, sequence_R, num_sequences)
    num_tokens_S = _sum_by_sequence((target_R != IGNORE_TARGET).long(), sequence_R, num_sequences)
    pairs = preference_loss(
        logp_S,
        ref_logp_S,
        num_tokens_S,
        beta=beta,
        loss=loss,
        label_smoothing=label_smoothing,
        length_normalize=length_normalize,
        nll_weight=nll_weight,
        reference_free=reference_free,
        target_margin=target_margin,
    )
    return LinearDpoLoss(
        pairs.loss_P.sum(),
        num_sequences // 2,
        pairs.margin_P.detach(),
        logp_S.detach(),
        num_tokens_S,
    )


def _check_sequences(sequence_R: Tensor, num_sequences: int) -> None:
    if sequence_R.device.type != "cpu" or sequence_R.numel() == 0:
        return
    lowest, highest = (int(bound) for bound in sequence_R.aminmax())
    if lowest < 0 or highest >= num_sequences:
        raise ValueError(
            f"sequence_R spans [{lowest}, {highest}], but must lie in [0, {num_sequences}), the "
            f"entries of ref_logp_S. Check that both belong to this pack."
        )


def _sum_by_sequence(value_R: Tensor, sequence_R: Tensor, num_sequences: int) -> Tensor:
    """(S,) sums. index_put, not index_add: deterministic on a GPU too."""
    return value_R.new_zeros(num_sequences).index_put((sequence_R,), value_R, accumulate=True)
