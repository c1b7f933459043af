"""What every algorithm gives the step: a sum of losses, the count to divide by, and sums of what users want to see.

R response rows, B sequences, P pairs. The division by the GLOBAL count happens once, in the optimizer step, so a loss does not
depend on how documents fell into packs, micro-batches, ranks or stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from nova_sys.data.batch import DevicePack


@dataclass(frozen=True)
class LossOutput:
    """loss_sum () fp64 with gradient; count () int; metric_sums (len(metric_names),) fp64 without gradient."""

    loss_sum: torch.Tensor
    count: torch.Tensor
    metric_sums: torch.Tensor


class Algorithm(Protocol):
    """`count_name`: what `count` counts, `num_tokens` or `num_pairs`.
    `metric_names`: the per-count means that the metric sums become; the first is `loss`."""

    @property
    def name(self) -> str: ...
    @property
    def count_name(self) -> str: ...
    @property
    def metric_names(self) -> tuple[str, ...]: ...
    @property
    def needs_reference(self) -> bool: ...
    def loss(self, logp_R: torch.Tensor, pack: DevicePack) -> LossOutput: ...
    def first_step_problem(self, means: dict[str, float], *, precision: str) -> str | None:
        """What in the first step's metrics shows that policy and reference are not the same weights; None: nothing, or there is no
        reference. precision: fp32 or bf16, in which the model runs."""
        ...


def sequence_logp(logp_R: torch.Tensor, pack: DevicePack) -> torch.Tensor:
    """seq_logp_B (B,) fp64: the sum of each sequence's row log-probabilities, nats.

    In fp64 because margins are small differences of large sums: at 400 nats an fp32 sum is only known to 3e-5.
    """
    logp_B = torch.zeros(pack.response_B.numel(), dtype=torch.float64, device=logp_R.device)
    return logp_B.index_put(
        (pack.sequence_R,), logp_R.double(), accumulate=True
    )  # deterministic on a GPU, unlike index_add


def sequence_tokens(pack: DevicePack) -> torch.Tensor:
    """num_tokens_B (B,) int64: how many tokens of each sequence carry loss."""
    num_tokens_B = torch.zeros_like(pack.response_B)
    return num_tokens_B.index_add_(0, pack.sequence_R, torch.ones_like(pack.sequence_R))
