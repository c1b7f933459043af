"""The preference losses: one small function each, in the table LOSSES.

Legend: P preference pairs. Log-probs are sums over a response's tokens, in nats; a `mean` is such
        a sum divided by the number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """What is known of each pair: log-probs, and token counts (at least 1) in the same dtype."""

    chosen_logp_P: Tensor
    rejected_logp_P: Tensor
    chosen_ref_logp_P: Tensor
    rejected_ref_logp_P: Tensor
    chosen_tokens_P: Tensor
    rejected_tokens_P: Tensor

    def without_reference(self) -> Pairs:
        zeros_P = torch.zeros_like(self.chosen_logp_P)
        return self._replace(chosen_ref_logp_P=zeros_P, rejected_ref_logp_P=zeros_P)

    def length_normalized(self) -> Pairs:
        """Log-probs per token, of policy and reference."""
        return self._replace(
            chosen_logp_P=self.chosen_logp_P / self.chosen_tokens_P,
            rejected_logp_P=self.rejected_logp_P / self.rejected_tokens_P,
            chosen_ref_logp_P=self.chosen_ref_logp_P / self.chosen_tokens_P,
            rejected_ref_logp_P=self.rejected_ref_logp_P / self.rejected_tokens_P,
        )


class LossAndRewards(NamedTuple):
    """One value per pair; the margin is chosen_reward - rejected_reward."""

    loss_P: Tensor
    chosen_reward_P: Tensor
    rejected_reward_P: Tensor


class LossParameters(NamedTuple):
    beta: float
    label_smoothing: float  # probability that a pair's labels are swapped
    target_margin: float  # SimPO's gamma


def sigmoid(pairs: Pairs, parameters: LossParameters) -> LossAndRewards:
    """DPO (arXiv 2305.18290): -log sigma(margin)."""
    chosen_P, rejected_P = _implicit_rewards(pairs, parameters.beta)
    return LossAndRewards(-F.logsigmoid(chosen_P - rejected_P), chosen_P, rejected_P)


def conservative(pairs: Pairs, parameters: LossParameters) -> LossAndRewards:
    """cDPO: cross-entropy with labels that are swapped with probability eps.

    -(1 - eps) log sigma(margin) - eps log sigma(-margin)
    """
    chosen_P, rejected_P = _implicit_rewards(pairs, parameters.beta)
    margin_P, eps = chosen_P - rejected_P, parameters.label_smoothing
    loss_P = -(1.0 - eps) * F.logsigmoid(margin_P) - eps * F.logsigmoid(-margin_P)
    return LossAndRewards(loss_P, chosen_P, rejected_P)


def robust(pairs: Pairs, parameters: LossParameters) -> LossAndRewards:
    """Robust DPO (arXiv 2403.00409): unbiased when labels are swapped with probability eps < 1/2.

    [-(1 - eps) log sigma(margin) + eps log sigma(-margin)] / (1 - 2 eps)
    """
    chosen_P, rejected_P = _implicit_rewards(pairs, parameters.beta)
    margin_P, eps = chosen_P - rejected_P, parameters.label_smoothing
    loss_P = -(1.0 - eps) * F.logsigmoid(margin_P) + eps * F.logsigmoid(-margin_P)
    return LossAndRewards(loss_P / (1.0 - 2.0 * eps), chosen_P, rejected_P)


def hinge(pairs: Pairs, parameters: LossParameters) -> LossAndRewards:
    """SLiC's hinge (arXiv 2305.10425) on DPO's margin: max(0, 1 - margin)."""
    chosen_P, rejected_P = _implicit_rewards(pairs, parameters.beta)
    return LossAndRewards(F.relu(1.0 - (chosen_P - rejected_P)), chosen_P, rejected_P)


def ipo(pairs: Pairs, parameters: LossParameters) -> LossAndRewards:
    """IPO (arXiv 2310.12036), on log-probs per token: (margin / beta - 1 / (2 beta))^2."""
    chosen_P, rejected_P = _implicit_rewards(pairs.length_normalized(), parameters.beta)
    gap_P = (chosen_P - rejected_P - 0.5) / parameters.beta
    return LossAndRewards(gap_P.square(), chosen_P, rejected_P)


def simpo(pairs: Pairs, parameters: LossParameters) -> LossAndRewards:
    """SimPO (arXiv 2405.14734): -log sigma(beta (mean_chosen - mean_rejected) - gamma)."""
    pairs = pairs.without_reference().length_normalized()
    chosen_P, rejected_P = _implicit_rewards(pairs, parameters.beta)
    loss_P = -F.logsigmoid(chosen_P - rejected_P - parameters.target_margin)
    return LossAndRewards(loss_P, chosen_P, rejected_P)


def orpo(pairs: Pairs, parameters: LossParameters) -> LossAndRewards:
    """ORPO (arXiv 2403.07691), no reference: -mean_chosen - beta log sigma(margin).

    The reward is the log-odds of the mean log-prob: log(q / (1 - q)) with q = exp(mean).
    """
    pairs = pairs.length_normalized()
    chosen_P = _log_odds(pairs.chosen_logp_P)
    rejected_P = _log_odds(pairs.rejected_logp_P)
    loss_P = -pairs.chosen_logp_P - parameters.beta * F.logsigmoid(chosen_P - rejected_P)
    return LossAndRewards(loss_P, chosen_P, rejected_P)


LOSSES: dict[str, Callable[[Pairs, LossParameters], LossAndRewards]] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "conservative": conservative,
    "hinge": hinge,
    "ipo": ipo,
    "simpo": simpo,
    "orpo": orpo,
}


def _implicit_rewards(pairs: Pairs, beta: float) -> tuple[Tensor, Tensor]:
    """beta (logp - ref_logp) of both responses."""
    chosen_P = beta * (pairs.chosen_logp_P - pairs.chosen_ref_logp_P)
    return chosen_P, beta * (pairs.rejected_logp_P - pairs.rejected_ref_logp_P)


def _log_odds(logp_P: Tensor) -> Tensor:
    """logp - log(1 - exp(logp)); a probability of 1 counts as one rounding step below it."""
    logp_P = logp_P.clamp(max=-torch.finfo(logp_P.dtype).eps)
    return logp_P - _log1mexp(logp_P)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)), x < 0: each branch where it loses no digits; both are finite up to -eps."""
    return torch.where(x > -math.log(2.0), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
