"""Preference losses from sequence log-probs.

Legend: S sequences (2p chosen, 2p + 1 rejected of pair p), P preference pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nova_kernels.checks import check_dtype, check_same_device, check_shape
from nova_kernels.preference_loss.losses import LOSSES, LossParameters, Pairs

__all__ = ["LOSSES", "PreferenceLoss", "preference_loss"]

SMOOTHED_LOSSES = ("conservative", "robust")
PER_TOKEN_LOSSES = ("ipo", "simpo", "orpo")  # these normalise by length themselves


@dataclass(frozen=True)
class PreferenceLoss:
    """One value per pair, each differentiable; margin = chosen_reward - rejected_reward."""

    loss_P: Tensor
    margin_P: Tensor
    chosen_reward_P: Tensor
    rejected_reward_P: Tensor


def preference_loss(
    logp_S: Tensor,
    ref_logp_S: Tensor,
    num_tokens_S: Tensor,
    *,
    beta: float,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalize: bool = False,
    nll_weight: float = 0.0,
    reference_free: bool = False,
    target_margin: float = 0.0,
) -> PreferenceLoss:
    """Loss and rewards of each preference pair; the equations stand in `losses.py`.

    reward = beta (logp - ref_logp)        margin = reward_chosen - reward_rejected
    loss   = LOSSES[loss](...) - nll_weight * logp_chosen / num_tokens_chosen
                                 (the latter is the term of RPO, arXiv 2404.19733)

    Args:     logp_S, ref_logp_S (S,) fp32|fp64, sums of log-probs in nats, S even: 2p is the
              chosen, 2p + 1 the rejected response of pair p. num_tokens_S (S,) int64, tokens in
              each sum.
              beta: > 0. loss: a key of LOSSES. label_smoothing: in [0, 0.5), for conservative
              and robust.
              length_normalize: log-probs per token; ipo, simpo and orpo always do.
              nll_weight: >= 0; orpo has one NLL term of its own already.
              reference_free: ref_logp_S is not read (it may be NaN); simpo and orpo never read it.
              target_margin: >= 0, for simpo: its gamma.
    Returns:  PreferenceLoss(loss_P, margin_P, chosen_reward_P, rejected_reward_P), logp_S's dtype.
              The reward of orpo is the log-odds of the mean log-prob.
    Gradients: logp_S (not ref_logp_S).   Collectives: none.   Memory: O(S).
    Raises:   ValueError for the above.
    """
    check_shape("logp_S", logp_S, ("S",))
    check_shape("ref_logp_S", ref_logp_S, (logp_S.shape[0],))
    check_shape("num_tokens_S", num_tokens_S, (logp_S.shape[0],))
    check_dtype("logp_S", logp_S, (torch.float32, torch.float64))
    check_dtype("ref_logp_S", ref_logp_S, (torch.float32, torch.float64))
    check_dtype("num_tokens_S", num_tokens_S, (torch.int64,))
    check_same_device(logp_S=logp_S, ref_logp_S=ref_logp_S, num_tokens_S=num_tokens_S)
    if logp_S.shape[0] % 2:
        raise ValueError(
            f"logp_S has {logp_S.shape[0]} sequences, but must have two per pair, chosen first. "
            f"Add or drop whole pairs."
        )
    check_loss_options(loss, beta, label_smoothing, nll_weight, target_margin)

    ref_logp_S = ref_logp_S.detach().to(logp_S.dtype)
    tokens_S = num_tokens_S.clamp(min=1).to(logp_S.dtype)
    pairs = Pairs(
        logp_S[0::2],
        logp_S[1::2],
        ref_logp_S[0::2],
        ref_logp_S[1::2],
        tokens_S[0::2],
        tokens_S[1::2],
    )
    chosen_mean_P = pairs.chosen_logp_P / pairs.chosen_tokens_P
    if reference_free:
        pairs = pairs.without_reference()
    if length_normalize and loss not in PER_TOKEN_LOSSES:
        pairs = pairs.length_normalized()
    loss_P, chosen_P, rejected_P = LOSSES[loss](
        pairs, LossParameters(beta, label_smoothing, target_margin)
    )
    if nll_weight:
        loss_P = loss_P - nll_weight * chosen_mean_P
    return PreferenceLoss(loss_P, chosen_P - rejected_P, chosen_P, rejected_P)


def check_loss_options(
    loss: str, beta: float, label_smoothing: float, nll_weight: float, target_margin: float
) -> None:
    """Raises for an unknown loss, a value out of range, or an option that the loss would ignore."""
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}, but must be one of {', '.join(LOSSES)}.")
    if not (beta > 0.0 and math.isfinite(beta)):
        raise ValueError(f"beta is {beta}, but must be positive and finite. 0.1 is usual for DPO.")
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing is {label_smoothing}, but must lie in [0, 0.5). "
            f"From 0.5 on, the labels would be no better than chance."
        )
    if label_smoothing and loss not in SMOOTHED_LOSSES:
        raise ValueError(
            f"label_smoothing is {label_smoothing}, but loss {loss!r} has no such term. "
            f"Use loss {' or '.join(SMOOTHED_LOSSES)}, or label_smoothing 0."
        )
    if not (nll_weight >= 0.0 and math.isfinite(nll_weight)):
        raise ValueError(
            f"nll_weight is {nll_weight}, but must be at least 0 and finite. 0 leaves the term out."
        )
    if not (target_margin >= 0.0 and math.isfinite(target_margin)):
        raise ValueError(
            f"target_margin is {target_margin}, but must be at least 0 and finite. 0 asks for none."
        )
    if target_margin and loss != "simpo":
        raise ValueError(
            f"target_margin is {target_margin}, but loss {loss!r} has no such term. "
            f"Use loss simpo, or target_margin 0."
        )
