"""Direct preference optimisation (arXiv 2305.18290):

    margin = beta * [(log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x))],      loss = -log sigma(margin)

summed over pairs and divided by their global number. Other losses of the same two log-probabilities are entries of
`nova_kernels.preference_loss.LOSSES`. Left out: length normalisation and mixing several losses.
"""

from __future__ import annotations

import torch

from nova_kernels import preference_loss
from nova_sys.algo.base import LossOutput, sequence_logp, sequence_tokens
from nova_sys.data.batch import DevicePack


class DPO:
    name = "dpo"
    count_name = "num_pairs"
    metric_names = (
        "loss",
        "reward_accuracy",
        "margin",
        "chosen_reward",
        "rejected_reward",
        "chosen_logp",
        "rejected_logp",
    )
    needs_reference = True

    def __init__(self, *, beta: float, loss: str) -> None:
        self.beta, self.loss_name = beta, loss

    def loss(self, logp_R: torch.Tensor, pack: DevicePack) -> LossOutput:
        logp_B = sequence_logp(logp_R, pack)
        result = preference_loss(
            logp_B, pack.ref_logp_B, sequence_tokens(pack), beta=self.beta, loss=self.loss_name
        )
        loss_sum = result.loss_P.sum().float()
        metrics = (
            loss_sum,
            (result.margin_P > 0).sum() + 0.5 * (result.margin_P == 0).sum(),  # a tie is half right
            result.margin_P.sum(),
            result.chosen_reward_P.sum(),
            result.rejected_reward_P.sum(),
            logp_B[0::2].sum(),  # sequence 2p is pair p's chosen answer, 2p + 1 its rejected one
            logp_B[1::2].sum(),
        )
        count = torch.full((), logp_B.numel() // 2, dtype=torch.int, device=logp_R.device)
        return LossOutput(loss_sum, count, torch.stack([m.detach().float() for m in metrics]))
