"""Direct preference optimisation (arXiv 2305.18290) and the other losses of the same log-probabilities:

    margin = beta * [(log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x))],      loss = -log sigma(margin)

summed over pairs and divided by their global number. `algo.loss` chooses among `nova_kernels.preference_loss.LOSSES`, whose equations
stand there. Left out: mixing several losses, and unpaired answers (KTO).
"""

from __future__ import annotations

import math
from functools import partial

import torch

from nova_kernels import preference_loss
from nova_sys.algo.base import LossOutput, sequence_logp, sequence_tokens
from nova_sys.config import REFERENCE_FREE_LOSSES
from nova_sys.data.batch import DevicePack

METRICS = (
    "loss",
    "reward_accuracy",
    "margin",
    "chosen_reward",
    "rejected_reward",
    "chosen_logp",
    "rejected_logp",
    "nll",
)
DRIFT = "drift"
"""With a reference: the mean of |log pi(y|x) - log ref(y|x)| over answers, nats. How far the policy has moved; 0 at step 0."""
LOSS_ROUNDING = {"fp32": 1e-5, "bf16": 1e-3}
DRIFT_ROUNDING = {"fp32": 1e-5, "bf16": 1e-2}
"""Nats by which two passes of the same weights may differ, per nat of an answer's log-prob + 1. Measured in the mean over answers of 13
to 2,000 nats: two packings in fp32 5e-10, bf16 from fp32 1.1e-3. A reference in another order: 0.6."""


class DPO:
    name = "dpo"
    count_name = "num_pairs"

    def __init__(
        self,
        *,
        beta: float,
        loss: str = "sigmoid",
        label_smoothing: float = 0.0,
        target_margin: float = 0.0,
        length_normalize: bool = False,
        nll_weight: float = 0.0,
    ) -> None:
        self.beta, self.loss_name, self.nll_weight = beta, loss, nll_weight
        self.needs_reference = loss not in REFERENCE_FREE_LOSSES
        self.metric_names = (*METRICS, DRIFT) if self.needs_reference else METRICS
        self._pair_losses = partial(
            preference_loss,
            beta=beta,
            loss=loss,
            label_smoothing=label_smoothing,
            target_margin=target_margin,
            length_normalize=length_normalize,
            nll_weight=nll_weight,
        )

    def loss(self, logp_R: torch.Tensor, pack: DevicePack) -> LossOutput:
        logp_B, num_tokens_B = sequence_logp(logp_R, pack), sequence_tokens(pack)
        result = self._pair_losses(logp_B, pack.ref_logp_B, num_tokens_B)
        loss_sum = result.loss_P.sum()
        mean_logp_B = logp_B / num_tokens_B.clamp(min=1)
        metrics = [
            loss_sum,
            (result.margin_P > 0).sum() + 0.5 * (result.margin_P == 0).sum(),  # a tie is half right
            result.margin_P.sum(),
            result.chosen_reward_P.sum(),
            result.rejected_reward_P.sum(),
            logp_B[0::2].sum(),  # sequence 2p is pair p's chosen answer, 2p + 1 its rejected one
            logp_B[1::2].sum(),
            -mean_logp_B[0::2].sum(),
        ]
        if self.needs_reference:
            metrics.append((logp_B - pack.ref_logp_B).abs().sum() / 2)
        count = torch.full((), logp_B.numel() // 2, dtype=torch.int, device=logp_R.device)
        return LossOutput(loss_sum, count, torch.stack([m.detach().double() for m in metrics]))

    def expected_first_loss(self, means: dict[str, float]) -> float:
        """Of margins that are 0, since policy and reference are equal at step 0: ln 2, or what the chosen loss gives there."""
        at_zero = {"hinge": 1.0, "ipo": 0.25 / self.beta**2}.get(self.loss_name, math.log(2.0))
        return at_zero + self.nll_weight * means["nll"]

    def first_step_problem(self, means: dict[str, float], *, precision: str) -> str | None:
        """The loss alone would hide much: faults of opposite sign cancel in it, and a small beta makes them small."""
        if not self.needs_reference:
            return None
        expected = self.expected_first_loss(means)
        off, allowed = abs(means["loss"] - expected), LOSS_ROUNDING[precision] * max(1.0, expected)
        if not off <= allowed:
            what = "ln 2 = 0.6931472" if expected == math.log(2.0) else f"{expected:.7f}"
            return f"the first DPO loss is {means['loss']:.7f}, which is {off:.1e} from {what} (allowed: {allowed:.0e})"
        size = (abs(means["chosen_logp"]) + abs(means["rejected_logp"])) / 2
        drift, allowed = means[DRIFT], DRIFT_ROUNDING[precision] * (1.0 + size)
        if not drift <= allowed:
            return (
                f"at the first step the policy's log-probs are {drift:.1e} nats from the reference's, in the mean over answers of "
                f"{size:.4g} nats (allowed: {allowed:.0e})"
            )
        return None
