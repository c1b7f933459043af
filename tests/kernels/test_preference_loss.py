"""preference_loss against formulas written out by hand, and linear_dpo_loss against its parts.

Legend: S sequences (2p chosen, 2p + 1 rejected), P preference pairs.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nova_kernels import linear_dpo_loss, linear_logprob, preference_loss
from nova_kernels.preference_loss import LOSSES
from nova_kernels.testing import seeded_normal

# One pair, by hand: log-ratios +1.5 (chosen) and -0.5 (rejected), so beta 0.5 gives a margin of 1.
LOGP_S = torch.tensor([-6.0, -8.0], dtype=torch.float64)
REF_S = torch.tensor([-7.5, -7.5], dtype=torch.float64)
TOKENS_S = torch.tensor([3, 4])
BETA = 0.5


def sigma(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def log_odds(mean: float) -> float:
    return math.log(math.exp(mean) / (1.0 - math.exp(mean)))


BY_HAND: dict[str, tuple[dict, float, float]] = {  # loss: options, loss by hand, margin by hand
    "sigmoid": ({}, math.log1p(math.exp(-1.0)), 1.0),
    "conservative": (
        {"label_smoothing": 0.1},
        0.9 * math.log1p(math.exp(-1.0)) + 0.1 * math.log1p(math.exp(1.0)),
        1.0,
    ),
    "robust": (
        {"label_smoothing": 0.1},
        (0.9 * math.log1p(math.exp(-1.0)) - 0.1 * math.log1p(math.exp(1.0))) / 0.8,
        1.0,
    ),
    "hinge": ({}, 0.0, 1.0),
    # means: 1.5 / 3 - (-0.5 / 4) = 0.625; 1 / (2 beta) = 1
    "ipo": ({}, (0.625 - 1.0) ** 2, 0.3125),
    # means: both -2; so give it a gamma
    "simpo": ({"target_margin": 0.3}, math.log1p(math.exp(0.3)), 0.0),
    "orpo": ({}, 2.0 + 0.5 * math.log(2.0), 0.0),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_values_by_hand(loss: str) -> None:
    options, expected, margin = BY_HAND[loss]
    result = preference_loss(LOGP_S, REF_S, TOKENS_S, beta=BETA, loss=loss, **options)
    assert result.loss_P.tolist() == pytest.approx([expected], abs=1e-12)
    assert result.margin_P.tolist() == pytest.approx([margin], abs=1e-12)
    assert torch.equal(result.margin_P, result.chosen_reward_P - result.rejected_reward_P)


def test_rewards_by_hand() -> None:
    result = preference_loss(LOGP_S, REF_S, TOKENS_S, beta=BETA)
    assert result.chosen_reward_P.tolist() == pytest.approx([0.75])
    assert result.rejected_reward_P.tolist() == pytest.approx([-0.25])
    result = preference_loss(LOGP_S, REF_S, TOKENS_S, beta=BETA, length_normalize=True)
    assert result.chosen_reward_P.tolist() == pytest.approx([0.25])
    assert result.rejected_reward_P.tolist() == pytest.approx([-0.0625])
    result = preference_loss(LOGP_S, REF_S, TOKENS_S, beta=BETA, reference_free=True)
    assert result.chosen_reward_P.tolist() == pytest.approx([-3.0])
    assert result.loss_P.tolist() == pytest.approx([math.log1p(math.exp(-1.0))])


def test_simpo_and_orpo_away_from_the_tie() -> None:
    tokens_S = torch.tensor([3, 2])  # means -2 and -4
    simpo = preference_loss(LOGP_S, REF_S, tokens_S, beta=2.0, loss="simpo", target_margin=1.0)
    assert simpo.loss_P.item() == pytest.approx(math.log1p(math.exp(-(2.0 * 2.0 - 1.0))))
    assert simpo.margin_P.item() == pytest.approx(4.0)
    orpo = preference_loss(LOGP_S, REF_S, tokens_S, beta=0.25, loss="orpo")
    ratio = log_odds(-2.0) - log_odds(-4.0)
    assert orpo.margin_P.item() == pytest.approx(ratio)
    assert orpo.loss_P.item() == pytest.approx(2.0 - 0.25 * math.log(sigma(ratio)))


def test_hinge_inside_its_kink() -> None:
    assert preference_loss(
        LOGP_S, REF_S, TOKENS_S, beta=0.25, loss="hinge"
    ).loss_P.item() == pytest.approx(0.5)


@pytest.mark.parametrize("loss", LOSSES)
def test_nll_of_the_chosen_is_added_per_token(loss: str) -> None:
    plain, with_nll = (
        preference_loss(LOGP_S, REF_S, TOKENS_S, beta=BETA, loss=loss, nll_weight=weight).loss_P
        for weight in (0.0, 0.7)
    )
    assert (with_nll - plain).item() == pytest.approx(0.7 * 6.0 / 3)


def test_equal_policies_give_ln2_and_no_margin() -> None:
    logp_S = seeded_normal(20, seed=0) * 50 - 200
    result = preference_loss(logp_S, logp_S, torch.full((20,), 30), beta=0.1)
    assert torch.equal(result.margin_P, torch.zeros(10))
    torch.testing.assert_close(result.loss_P, torch.full((10,), math.log(2.0)))


def random_pairs() -> tuple[Tensor, Tensor, Tensor]:
    tokens_S = torch.arange(1, 13)
    logp_S = -tokens_S * (0.3 + seeded_normal(12, seed=1, dtype=torch.float64).abs())
    ref_logp_S = logp_S + seeded_normal(12, seed=2, dtype=torch.float64)
    return logp_S.requires_grad_(), ref_logp_S, tokens_S


@pytest.mark.parametrize("length_normalize", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss: str, length_normalize: bool) -> None:
    logp_S, ref_logp_S, tokens_S = random_pairs()
    smoothing = 0.2 if loss in ("conservative", "robust") else 0.0

    def function(logp_S: Tensor) -> tuple[Tensor, ...]:
        result = preference_loss(
            logp_S, ref_logp_S, tokens_S, beta=0.3, loss=loss, label_smoothing=smoothing,
            length_normalize=length_normalize, nll_weight=0.1,
        )  # fmt: skip
        return result.loss_P, result.margin_P, result.chosen_reward_P, result.rejected_reward_P

    assert torch.autograd.gradcheck(function, logp_S)


@pytest.mark.parametrize("loss", LOSSES)
def test_descent_raises_the_chosen_and_lowers_the_rejected(loss: str) -> None:
    """At margin 0 every loss falls with the chosen log-prob and rises with the rejected one."""
    tokens_S = torch.tensor([5, 5])
    logp_S = torch.tensor([-4.0, -4.0], requires_grad=True)
    preference_loss(logp_S, logp_S, tokens_S, beta=0.1, loss=loss).loss_P.sum().backward()
    assert logp_S.grad[0] < 0 < logp_S.grad[1]


def test_dpo_slope_by_hand() -> None:
    logp_S = LOGP_S.clone().requires_grad_()
    preference_loss(logp_S, REF_S, TOKENS_S, beta=BETA).loss_P.sum().backward()
    slope = BETA * sigma(-1.0)
    assert logp_S.grad.tolist() == pytest.approx([-slope, slope])


def test_robust_is_unbiased_under_swapped_labels() -> None:
    """(1 - eps) L(pair) + eps L(swapped pair) is the loss of clean labels."""
    eps, swapped = 0.2, torch.tensor([1, 0])
    noisy = [
        preference_loss(
            LOGP_S[order], REF_S[order], TOKENS_S[order], beta=BETA, loss="robust",
            label_smoothing=eps,
        ).loss_P
        for order in (slice(None), swapped)
    ]  # fmt: skip
    clean = preference_loss(LOGP_S, REF_S, TOKENS_S, beta=BETA).loss_P
    torch.testing.assert_close((1 - eps) * noisy[0] + eps * noisy[1], clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logp", [0.0, -1e-9, -1e-6, -1e4, -1e6])
@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_log_probs_stay_finite(loss: str, logp: float, dtype: torch.dtype) -> None:
    for sequence in (0, 1):
        logp_S = torch.full((2,), -3.0, dtype=dtype)
        logp_S[sequence] = logp
        logp_S.requires_grad_()
        result = preference_loss(
            logp_S, torch.full((2,), -3.0, dtype=dtype), torch.tensor([2, 2]), beta=0.1, loss=loss
        )
        result.loss_P.sum().backward()
        assert torch.isfinite(result.loss_P).all()
        assert torch.isfinite(result.margin_P).all()
        assert torch.isfinite(logp_S.grad).all()


@pytest.mark.parametrize("mean", [-1e-6, -1e-3, -0.1, -0.69, -0.7, -3.0, -30.0, -200.0])
def test_log_odds_keep_their_digits_in_fp32(mean: float) -> None:
    rewards = {}
    for dtype in (torch.float32, torch.float64):
        logp_S = torch.tensor([mean, -1.0], dtype=torch.float32).to(dtype)
        rewards[dtype] = preference_loss(
            logp_S, logp_S, torch.tensor([1, 1]), beta=1.0, loss="orpo"
        ).chosen_reward_P.item()
    assert rewards[torch.float32] == pytest.approx(rewards[torch.float64], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_missing_reference_is_not_read(loss: str) -> None:
    nan_S = torch.full_like(REF_S, float("nan"))
    free = loss not in ("simpo", "orpo")
    logp_S = LOGP_S.clone().requires_grad_()
    result = preference_loss(logp_S, nan_S, TOKENS_S, beta=BETA, loss=loss, reference_free=free)
    result.loss_P.sum().backward()
    assert torch.isfinite(result.loss_P).all()
    assert torch.isfinite(logp_S.grad).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": "dpo"}, "loss is 'dpo'.*sigmoid"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"label_smoothing": 0.5, "loss": "robust"}, "label_smoothing is 0.5"),
        ({"label_smoothing": 0.1}, "'sigmoid' has no such term.*conservative"),
        ({"nll_weight": -1.0}, "nll_weight is -1.0"),
        ({"target_margin": -1.0, "loss": "simpo"}, "target_margin is -1.0"),
        ({"target_margin": 1.0}, "'sigmoid' has no such term.*simpo"),
        ({"logp_S": torch.zeros(3)}, "ref_logp_S has shape"),
        ({"logp_S": torch.zeros(2, dtype=torch.bfloat16)}, "logp_S has dtype bfloat16"),
        ({"num_tokens_S": torch.ones(2)}, "num_tokens_S has dtype"),
        (
            {key: torch.zeros(3) for key in ("logp_S", "ref_logp_S")}
            | {"num_tokens_S": torch.ones(3, dtype=torch.int64)},
            "logp_S has 3 sequences",
        ),
    ],
)
def test_mistakes_are_explained(change: dict, words: str) -> None:
    arguments = {"logp_S": LOGP_S, "ref_logp_S": REF_S, "num_tokens_S": TOKENS_S, "beta": BETA}
    with pytest.raises(ValueError, match=words):
        preference_loss(**(arguments | change))


def linear_case(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    R, S = 41, 6
    target_R = torch.randint(0, 97, (R,), generator=generator)
    target_R[::7] = -100
    return {
        "hidden_TD": seeded_normal(50, 12, seed=4, dtype=dtype).requires_grad_(),
        "weight_VD": seeded_normal(101, 12, seed=5, dtype=dtype).requires_grad_(),
        "row_R": torch.randint(0, 50, (R,), generator=generator),
        "target_R": target_R,
        "sequence_R": torch.randint(0, S, (R,), generator=generator),
        "ref_logp_S": -20 - 5 * seeded_normal(S, seed=6).abs(),
    }


@pytest.mark.parametrize("plan", ["recompute", "store"])
@pytest.mark.parametrize("loss", LOSSES)
def test_linear_dpo_loss_is_the_composition(loss: str, plan: str) -> None:
    case = linear_case()
    head = {"vocab_size": 97, "normalize_weight": True, "temperature": 0.2, "plan": plan}
    pair = {"beta": 0.2, "loss": loss, "nll_weight": 0.1, "length_normalize": True}
    if loss in ("conservative", "robust"):
        pair["label_smoothing"] = 0.1
    if loss == "simpo":
        pair["target_margin"] = 0.5
    result = linear_dpo_loss(**case, **pair, **head)
    inputs = (case["hidden_TD"], case["weight_VD"])
    gradients = torch.autograd.grad(result.loss_sum, inputs)

    tensors = [case[key] for key in ("hidden_TD", "weight_VD", "row_R", "target_R")]
    logp_R = linear_logprob(*tensors, **head).logp_R
    member_SR = case["sequence_R"] == torch.arange(6)[:, None]
    logp_S = torch.stack([logp_R[member_R].sum() for member_R in member_SR])
    tokens_S = (member_SR & (case["target_R"] != -100)).sum(1)
    parts = preference_loss(logp_S, case["ref_logp_S"], tokens_S, **pair)
    expected = torch.autograd.grad(parts.loss_P.sum(), inputs)

    close = torch.testing.assert_close
    assert result.num_pairs == 3
    assert torch.equal(result.num_tokens_S, tokens_S)
    close(result.loss_sum, parts.loss_P.sum())
    close(result.margin_P, parts.margin_P.detach())
    close(result.logp_S, logp_S.detach())
    for got, want in zip(gradients, expected, strict=True):
        close(got, want)
    assert not (result.margin_P.requires_grad or result.logp_S.requires_grad)


def test_linear_dpo_loss_gradcheck() -> None:
    case = linear_case()
    inputs = (case.pop("hidden_TD"), case.pop("weight_VD"))
    assert torch.autograd.gradcheck(
        lambda h, w: linear_dpo_loss(h, w, **case, beta=0.3).loss_sum, inputs, fast_mode=True
    )


def test_policy_equal_to_reference_gives_ln2() -> None:
    case = linear_case(torch.float32)
    case["ref_logp_S"] = linear_dpo_loss(**case, beta=0.1).logp_S
    result = linear_dpo_loss(**case, beta=0.1)
    assert torch.equal(result.margin_P, torch.zeros(3))
    assert result.loss_sum.item() / result.num_pairs == pytest.approx(math.log(2.0), abs=1e-6)


@pytest.mark.parametrize("num_pairs", [0, 2])
def test_no_rows_stay_in_the_graph(num_pairs: int) -> None:
    case = linear_case(torch.float32)
    for key in ("row_R", "target_R", "sequence_R"):
        case[key] = case[key][:0]
    case["ref_logp_S"] = torch.zeros(2 * num_pairs)
    result = linear_dpo_loss(**case, beta=0.1)
    result.loss_sum.backward()
    assert result.num_pairs == num_pairs
    assert result.loss_sum.item() == pytest.approx(num_pairs * math.log(2.0))
    for key in ("hidden_TD", "weight_VD"):
        assert torch.equal(case[key].grad, torch.zeros_like(case[key]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sequence_R": torch.full((41,), 6)}, r"sequence_R spans \[6, 6\].*\[0, 6\)"),
        ({"sequence_R": torch.zeros(40, dtype=torch.int64)}, "sequence_R has shape"),
        ({"ref_logp_S": torch.zeros(7)}, "7 sequences"),
        ({"backend": "triton"}, "backend='triton'"),
    ],
)
def test_linear_dpo_mistakes_are_explained(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        linear_dpo_loss(**(linear_case() | change), beta=0.1)
