"""Supervised fine-tuning: -sum_t log p(y_t | x, y_<t) over the tokens that carry loss, divided by their global number.

Left out: label smoothing and length-normalised variants; a per-document mean would weigh short answers more.
"""

from __future__ import annotations

import torch

from nova_sys.algo.base import LossOutput
from nova_sys.data.batch import DevicePack


class SFT:
    name = "sft"
    count_name = "num_tokens"
    metric_names = ("loss",)
    needs_reference = False

    def loss(self, logp_R: torch.Tensor, pack: DevicePack) -> LossOutput:
        nll = -logp_R.double().sum()
        count = torch.full((), logp_R.numel(), dtype=torch.int, device=logp_R.device)
        return LossOutput(nll, count, nll.detach()[None])

    def first_step_problem(self, means: dict[str, float], *, precision: str) -> None:
        return None
