"""How the next token is chosen: greedily, or drawn with a temperature from the nucleus of the distribution.

R rows (one per sequence), V vocabulary. A draw uses one random number, which is a function of (seed, prompt, sample, step) alone: what
is drawn does not depend on how prompts are batched, in which order they finish, or on the layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

BLOCK_BYTES = 64 * 2**20
"""Of one fp64 array of probabilities; rows are drawn in blocks, so that a large batch with a large vocabulary needs little memory."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 is greedy: the most probable token, the one with the lower id of equals.   top_p: see `nucleus`.

    Raises: ValueError for a value out of range, and for one that would have no effect.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    num_samples: int = 1

    def __post_init__(self) -> None:
        greedy = self.temperature == 0
        rules = [
            (self.max_new_tokens >= 1, "max_new_tokens", "must be 1 or more"),
            (
                0 <= self.temperature < math.inf,
                "temperature",
                "must be 0 (greedy) or more, and finite; 1 is the model's own distribution",
            ),
            (
                0 < self.top_p <= 1,
                "top_p",
                "must be above 0 and at most 1, which keeps every token",
            ),
            (0 <= self.seed < 2**64, "seed", "must be 0 or more and fit into 64 bits"),
            (1 <= self.num_samples < 2**32, "num_samples", "must be 1 or more"),
            (
                not (greedy and self.num_samples > 1),
                "num_samples",
                "at temperature 0 all samples of a prompt are the same; set a temperature such as 1, or leave it out",
            ),
            (
                not (greedy and self.top_p < 1),
                "top_p",
                "has no effect at temperature 0, which takes the most probable token; set a temperature such as 1, or leave it out",
            ),
        ]
        for holds, name, rule in rules:
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)}: {rule}")


def uniforms(sampling: Sampling, items: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Random numbers in [0, 1) for each (prompt, sample) and step: (len(items), max_new_tokens) fp64.

    A Philox stream per item, keyed by (seed, prompt, sample); its n-th number is for step n.
    """
    rows = np.empty((len(items), sampling.max_new_tokens))
    for row, (prompt, sample) in zip(rows, items, strict=True):
        key = np.array([sampling.seed, (prompt << 32) + sample], dtype=np.uint64)
        np.random.Generator(np.random.Philox(key=key)).random(out=row)
    return torch.from_numpy(rows)


def choose_tokens(
    logits_RV: torch.Tensor, uniform_R: torch.Tensor | None, sampling: Sampling
) -> torch.Tensor:
    """token_R (R,) int64. The draw inverts the cumulative distribution in the order of token ids, in fp64.

    Args:  logits_RV fp32.   uniform_R (R,) fp64 in [0, 1); None when greedy.
    """
    if uniform_R is None:
        return logits_RV.argmax(dim=-1)
    rows = max(1, BLOCK_BYTES // (8 * logits_RV.shape[1]))
    blocks = zip(logits_RV.split(rows), uniform_R.split(rows), strict=True)
    return torch.cat([_draw(logits, uniform, sampling) for logits, uniform in blocks])


def _draw(logits_RV: torch.Tensor, uniform_R: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    z_RV = logits_RV.double()
    p_RV = ((z_RV - z_RV.amax(dim=-1, keepdim=True)) / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        p_RV = p_RV * nucleus(p_RV, sampling.top_p)
    cumulative_RV = p_RV.cumsum(dim=-1)
    total_R1 = cumulative_RV[:, -1:]
    # Below the total, however it rounds: the first entry above the number is then a token that the distribution allows.
    target_R1 = (uniform_R[:, None] * total_R1).minimum(total_R1.nextafter(total_R1.new_zeros(())))
    token_R = torch.searchsorted(cumulative_RV, target_R1, right=True)[:, 0]
    return token_R.clamp(
        max=p_RV.shape[1] - 1
    )  # undefined logits: the caller sees an undefined logp


def nucleus(p_RV: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest set of most probable tokens that holds at least `top_p` of the probability, (R, V) bool (arXiv 1904.09751).

    A token is in it when the tokens ranked before it hold less than `top_p`; of equally probable ones the lower id ranks first.
    """
    sorted_RV, order_RV = p_RV.sort(dim=-1, descending=True, stable=True)
    kept_RV = sorted_RV.cumsum(dim=-1) - sorted_RV < top_p
    return torch.zeros_like(kept_RV).scatter(1, order_RV, kept_RV)


def chosen_logps(logits_RV: torch.Tensor, token_R: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[token] (R,) fp32, nats: the model's own probability, at temperature 1 and without a nucleus."""
    return logits_RV.gather(1, token_R[:, None])[:, 0] - logits_RV.logsumexp(dim=-1)
