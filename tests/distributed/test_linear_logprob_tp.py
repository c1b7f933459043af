"""Vocabulary-parallel linear_logprob and linear_dpo_loss on gloo ranks against one rank.

Legend: T packed tokens, R response rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nova_kernels import linear_dpo_loss, linear_logprob
from nova_kernels.backend import triton_runs_on
from nova_kernels.testing import run_ranks, seeded_normal

T, D, VOCAB_SIZE = 70, 24, 1001
TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
}
OPTIONS: list[dict] = [
    {},
    {"normalize_weight": True, "temperature": 0.6},
    {"return_entropy": True, "return_max_logit": True},
]
CASES = [  # rows, columns of padding behind the vocabulary, options, plan
    *((R, 0, {}, plan) for R in (0, 1, 63) for plan in ("store", "recompute")),
    *((63, 0, options, plan) for options in OPTIONS[1:] for plan in ("store", "recompute")),
    (63, 1100, OPTIONS[2], "store"),  # whole shards of padding, and one that has some
    (63, 1100, OPTIONS[2], "recompute"),
    (0, 0, OPTIONS[2], "recompute"),
]
TRITON_CASES = [  # in Triton's interpreter, which is slow
    (63, 0, {}, "recompute"),
    (63, 0, OPTIONS[1], "store"),
    (63, 1100, OPTIONS[2], "store"),
    (63, 1100, OPTIONS[2], "recompute"),
    (1, 1100, {}, "store"),
    (0, 0, {}, "recompute"),
]


def make_inputs(R: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """hidden, weight with `columns` rows (NaN behind the vocabulary), row, target, upstream."""
    generator = torch.Generator().manual_seed(R)
    weight_VD = seeded_normal(columns, D, seed=1, dtype=dtype)
    weight_VD[VOCAB_SIZE:] = float("nan")
    target_R = torch.randint(0, VOCAB_SIZE, (R,), generator=generator)
    target_R[3::5] = -100
    row_R = torch.randint(0, T, (R,), generator=generator)
    return (
        seeded_normal(T, D, seed=2, dtype=dtype),
        weight_VD,
        row_R,
        target_R,
        seeded_normal(3, R, seed=3, dtype=dtype),
    )


def run_case(inputs: tuple[Tensor, ...], shard: slice, **options) -> list[Tensor]:
    """Outputs, dhidden and the shard's dweight."""
    hidden_TD, weight_VD, row_R, target_R, upstream_3R = inputs
    hidden_TD = hidden_TD.clone().requires_grad_()
    weight_VD = weight_VD[shard].clone().requires_grad_()
    result = linear_logprob(hidden_TD, weight_VD, row_R, target_R, vocab_size=VOCAB_SIZE, **options)
    used = [(out, g) for out, g in zip(result, upstream_3R, strict=True) if out is not None]
    torch.autograd.backward([out for out, _ in used], [g.to(out.dtype) for out, g in used])
    return [out.detach() for out, _ in used] + [hidden_TD.grad, weight_VD.grad]


def padded_columns(world_size: int, padding: int) -> int:
    return -(-(VOCAB_SIZE + padding) // world_size) * world_size


def triton_rank(rank: int) -> list[list[Tensor]]:
    return logprob_rank(rank, torch.float32, TRITON_CASES, backend="triton")


def rank_main(rank: int) -> tuple[dict, dict]:
    return (
        {dtype: logprob_rank(rank, dtype, CASES) for dtype in TOLERANCES},
        {R: dpo_rank(rank, R) for R in (0, 63)},
    )


def logprob_rank(
    rank: int, dtype: torch.dtype, given: list, backend: str = "auto"
) -> list[list[Tensor]]:
    world_size = dist.get_world_size()
    results = []
    for R, padding, options, plan in given:
        columns = padded_columns(world_size, padding)
        shard = slice(rank * columns // world_size, (rank + 1) * columns // world_size)
        inputs = make_inputs(R, columns, dtype)
        call = options | {"tp_group": dist.group.WORLD, "plan": plan, "backend": backend}
        results.append(run_case(inputs, shard, **call))
        again = run_case(inputs, shard, **call)
        assert all(torch.equal(one, other) for one, other in zip(results[-1], again, strict=True))
    return results


def dpo_rank(rank: int, R: int) -> tuple[Tensor, ...]:
    world_size = dist.get_world_size()
    columns = padded_columns(world_size, 0)
    hidden_TD, weight_VD, row_R, target_R, _ = make_inputs(R, columns, torch.float64)
    hidden_TD.requires_grad_()
    weight_VD = weight_VD.chunk(world_size)[rank].clone().requires_grad_()
    result = linear_dpo_loss(
        hidden_TD,
        weight_VD,
        row_R,
        target_R,
        torch.arange(R) % 4,
        torch.full((4,), -50.0),
        beta=0.1,
        vocab_size=VOCAB_SIZE,
        tp_group=dist.group.WORLD,
    )
    result.loss_sum.backward()
    return result.loss_sum.detach(), result.margin_P, hidden_TD.grad, weight_VD.grad


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_agree_with_one_rank(world_size: int) -> None:
    by_rank = run_ranks(rank_main, world_size, timeout_s=180.0)
    for dtype in TOLERANCES:
        check_logprob([logprobs[dtype] for logprobs, _ in by_rank], dtype, CASES)
    for R in (0, 63):
        check_dpo([losses[R] for _, losses in by_rank], R)


@pytest.mark.skipif(
    not triton_runs_on(torch.device("cpu")), reason="Triton is not installed, or a GPU runs it"
)
@pytest.mark.parametrize("world_size", [2, 4])
def test_triton_ranks_agree_with_one_rank(world_size: int) -> None:
    """With the reference on one rank; the collectives are the reference's own code."""
    by_rank = run_ranks(triton_rank, world_size, timeout_s=300.0)
    check_logprob(by_rank, torch.float32, TRITON_CASES)


def check_logprob(by_rank: list[list[list[Tensor]]], dtype: torch.dtype, given: list) -> None:
    for index, (R, padding, options, plan) in enumerate(given):
        columns = padded_columns(len(by_rank), padding)
        alone = run_case(make_inputs(R, columns, dtype), slice(None), plan=plan, **options)
        ranks = [results[index] for results in by_rank]
        close = partial(torch.testing.assert_close, **TOLERANCES[dtype])
        for rank_tensors in ranks:
            for got, want in zip(rank_tensors[:-1], alone[:-1], strict=True):
                close(got, want)
            for got, first in zip(rank_tensors[:-1], ranks[0][:-1], strict=True):
                assert torch.equal(got, first)  # every rank holds the same bits
        close(torch.cat([tensors[-1] for tensors in ranks]), alone[-1])


def check_dpo(ranks: list[tuple[Tensor, ...]], R: int) -> None:
    """Against plain torch on the whole vocabulary."""
    columns = padded_columns(len(ranks), 0)
    hidden_TD, weight_VD, row_R, target_R, _ = make_inputs(R, columns, torch.float64)
    hidden_TD.requires_grad_()
    weight_VD.requires_grad_()
    used_VD = weight_VD[:VOCAB_SIZE]
    logp_RV = F.log_softmax(hidden_TD[row_R] @ used_VD.t(), dim=1)
    logp_R = logp_RV.gather(1, target_R.clamp(min=0)[:, None])[:, 0] * (target_R != -100)
    logp_S = torch.stack([logp_R[s::4].sum() for s in range(4)])
    margin_P = 0.1 * ((logp_S[0::2] + 50.0) - (logp_S[1::2] + 50.0))
    loss_sum = -F.logsigmoid(margin_P).sum()
    loss_sum.backward()
    for rank, (got_sum, got_margin_P, dhidden_TD, dweight_VD) in enumerate(ranks):
        torch.testing.assert_close(got_sum, loss_sum.detach())
        torch.testing.assert_close(got_margin_P, margin_P.detach())
        torch.testing.assert_close(dhidden_TD, hidden_TD.grad)
        torch.testing.assert_close(dweight_VD, weight_VD.grad.chunk(len(ranks))[rank])
