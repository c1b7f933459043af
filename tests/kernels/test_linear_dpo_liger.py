"""linear_dpo_loss on prefix-shared rows against Liger's fused losses on padded pairs, in fp32: values and gradients.

Legend: T packed tokens, R response rows, D hidden, V vocabulary, P pairs, S sequences, L padded length.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from nova_kernels import linear_dpo_loss, linear_logprob
from nova_kernels.testing import seeded_normal

liger = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger is not installed")

D, V, BETA = 24, 307, 0.3
LENGTHS = [(9, 4, 7), (1, 12, 3), (20, 1, 1), (6, 5, 5)]
"""Of each pair: prefix, chosen answer, rejected answer."""


class Pairs(NamedTuple):
    num_tokens: int
    row_R: Tensor
    target_R: Tensor
    sequence_R: Tensor
    token_SL: Tensor  # index into the packed tokens; 0 in the padding
    label_SL: Tensor  # -100 in prefix and padding; sequences as Liger wants them: chosen first


def pairs() -> Pairs:
    generator = torch.Generator().manual_seed(0)
    P, longest = len(LENGTHS), max(prefix + max(answers) for prefix, *answers in LENGTHS)
    token_SL = torch.zeros(2 * P, longest, dtype=torch.int64)
    label_SL = torch.full((2 * P, longest), -100)
    rows: list[Tensor] = []
    targets: list[Tensor] = []
    sequences: list[Tensor] = []
    start = 0
    for p, (prefix, *answers) in enumerate(LENGTHS):
        first = start + prefix
        for side, length in enumerate(answers):
            tokens = torch.arange(first, first + length)
            # A row predicts the token behind it; the first one is the last token of the prefix.
            row = torch.cat([torch.tensor([start + prefix - 1]), tokens[:-1]])
            target = torch.randint(0, V, (length,), generator=generator)
            rows.append(row)
            targets.append(target)
            sequences.append(torch.full((length,), 2 * p + side))
            line = side * P + p
            token_SL[line, :prefix] = torch.arange(start, start + prefix)
            token_SL[line, prefix : prefix + length] = tokens
            label_SL[line, prefix - 1 : prefix + length - 1] = target
            first += length
        start = first
    return Pairs(
        start, torch.cat(rows), torch.cat(targets), torch.cat(sequences), token_SL, label_SL
    )


PAIRS = pairs()


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    """Hidden states and an output weight, with gradients."""
    hidden_TD = seeded_normal(PAIRS.num_tokens, D, seed=seed).requires_grad_()
    return hidden_TD, (seeded_normal(V, D, seed=seed + 1) / 2).requires_grad_()


def gradients(loss: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def ours(inputs: tuple[Tensor, Tensor], ref_logp_S: Tensor, **options: object) -> list[Tensor]:
    result = linear_dpo_loss(
        *inputs, PAIRS.row_R, PAIRS.target_R, PAIRS.sequence_R, ref_logp_S, beta=BETA, **options
    )
    return gradients(result.loss_sum / result.num_pairs, inputs)


def close(got: list[Tensor], expected: list[Tensor]) -> None:
    for value, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize(("loss", "smoothing"), [("sigmoid", 0.0), ("hinge", 0.0), ("robust", 0.2)])
def test_dpo_agrees_with_liger(loss: str, smoothing: float, chunk_size: int) -> None:
    inputs, (ref_hidden_TD, ref_weight_VD) = drawn(0), drawn(10)
    with torch.no_grad():
        ref_logp_R = linear_logprob(ref_hidden_TD, ref_weight_VD, *PAIRS[1:3]).logp_R
    ref_logp_S = torch.zeros(2 * len(LENGTHS)).index_add(0, PAIRS.sequence_R, ref_logp_R)
    theirs = liger.LigerFusedLinearDPOLoss(
        beta=BETA,
        loss_type=loss,
        label_smoothing=smoothing,
        compiled=False,
        chunk_size=chunk_size,
    )
    value, _ = theirs(
        inputs[1],
        inputs[0][PAIRS.token_SL],
        PAIRS.label_SL,
        ref_input=ref_hidden_TD[PAIRS.token_SL].detach(),
        ref_weight=ref_weight_VD.detach(),
    )
    close(ours(inputs, ref_logp_S, loss=loss, label_smoothing=smoothing), gradients(value, inputs))


def test_simpo_agrees_with_liger() -> None:
    inputs = drawn(0)
    theirs = liger.LigerFusedLinearSimPOLoss(
        beta=BETA, gamma=0.7, compute_nll_loss=False, compiled=False
    )
    value, _ = theirs(inputs[1], inputs[0][PAIRS.token_SL], PAIRS.label_SL)
    no_reference_S = torch.full((2 * len(LENGTHS),), torch.nan)
    close(ours(inputs, no_reference_S, loss="simpo", target_margin=0.7), gradients(value, inputs))


def test_orpo_agrees_with_liger() -> None:
    """But for the NLL, which Liger averages over the tokens of the batch, we over each answer's: ours is added to their loss."""
    inputs = drawn(0)
    theirs = liger.LigerFusedLinearORPOLoss(beta=BETA, compute_nll_loss=False, compiled=False)
    value, _ = theirs(inputs[1], inputs[0][PAIRS.token_SL], PAIRS.label_SL)
    no_reference_S = torch.full((2 * len(LENGTHS),), torch.nan)
    chosen_R = PAIRS.sequence_R % 2 == 0
    tokens_S = torch.bincount(PAIRS.sequence_R)
    logp_R = linear_logprob(*inputs, PAIRS.row_R, PAIRS.target_R).logp_R
    mean_R = logp_R / tokens_S[PAIRS.sequence_R]
    nll = -mean_R[chosen_R].sum() / len(LENGTHS)
    close(ours(inputs, no_reference_S, loss="orpo"), gradients(value + nll, inputs))
