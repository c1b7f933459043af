"""linear_logprob and a dense log_softmax on the same inputs: what the tests of every backend share.

Legend: T packed tokens, R response rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nova_kernels import linear_logprob
from nova_kernels.testing import assert_close_to, poison, seeded_normal

PLANS = ("recompute", "store")


class Case(NamedTuple):
    hidden_TD: Tensor
    weight_VD: Tensor
    row_R: Tensor
    target_R: Tensor
    upstream_3R: Tensor  # of logp, entropy, max_logit


def make_case(
    R: int, V: int, *, D: int = 16, T: int = 80, seed: int = 0, ignored: float = 0.1
) -> Case:
    """Unsorted, repeated rows; some targets ignored; logits of a few units."""
    generator = torch.Generator().manual_seed(seed)
    target_R = torch.randint(0, V, (R,), generator=generator)
    target_R[torch.rand(R, generator=generator) < ignored] = -100
    return Case(
        seeded_normal(T, D, seed=seed),
        seeded_normal(V, D, seed=seed + 1),
        torch.randint(0, T, (R,), generator=generator),
        target_R,
        seeded_normal(3, R, seed=seed + 2),
    )


def leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that collects its own gradient."""
    return tensor.detach().to(dtype, copy=True).requires_grad_()


def dense(case: Case, dtype: torch.dtype, **options) -> list[Tensor]:
    """Plain torch: (logp, entropy, max_logit, dhidden, dweight), all logits in memory."""
    hidden_TD, weight_VD = leaf(case.hidden_TD, dtype), leaf(case.weight_VD, dtype)
    used_VD = F.normalize(weight_VD, dim=1) if options.get("normalize_weight") else weight_VD
    logits_RV = (hidden_TD[case.row_R] @ used_VD.t()) / options.get("temperature", 1.0)
    logits_RV = logits_RV[:, : options.get("vocab_size")]
    ignored_R = case.target_R == -100
    full_RV = torch.log_softmax(logits_RV, dim=1)
    logp_R = full_RV.gather(1, case.target_R.clamp(min=0)[:, None])[:, 0]
    outputs = [
        torch.where(ignored_R, 0.0, value_R)
        for value_R in (logp_R, -(full_RV.exp() * full_RV).sum(1), logits_RV.amax(1))
    ]
    wanted = [True, options.get("return_entropy", False), options.get("return_max_logit", False)]
    loss = sum(
        (g * out).sum()
        for g, out, use in zip(case.upstream_3R, outputs, wanted, strict=True)
        if use
    )
    loss.backward()
    gradients = [hidden_TD.grad, weight_VD.grad]
    return [out.detach() for out, use in zip(outputs, wanted, strict=True) if use] + gradients


def ours(case: Case, dtype: torch.dtype, **options) -> list[Tensor]:
    hidden_TD, weight_VD = leaf(case.hidden_TD, dtype), leaf(case.weight_VD, dtype)
    with poison():
        result = linear_logprob(hidden_TD, weight_VD, case.row_R, case.target_R, **options)
        outputs = [out for out in result if out is not None]
        wanted = [out is not None for out in result]
        upstream = [g for g, use in zip(case.upstream_3R, wanted, strict=True) if use]
        torch.autograd.backward(outputs, [g.to(outputs[0].dtype) for g in upstream])
    return [out.detach() for out in outputs] + [hidden_TD.grad, weight_VD.grad]


def check(case: Case, dtype: torch.dtype, *, call: dict | None = None, **options) -> None:
    """`call` holds options that must not change the result."""
    check_calls(case, dtype, [call or {}], **options)


def check_calls(case: Case, dtype: torch.dtype, calls: list[dict], **options) -> None:
    rounded = case._replace(  # so that all start from the same numbers
        hidden_TD=case.hidden_TD.to(dtype), weight_VD=case.weight_VD.to(dtype)
    )
    wide = [t.double() for t in dense(rounded, torch.float64, **options)]
    plain = dense(rounded, dtype, **options)
    names = ["logp"] + [n for n in ("entropy", "max_logit") if options.get(f"return_{n}")]
    names += ["dhidden", "dweight"]
    for call in calls:
        got = ours(rounded, dtype, **options, **call)
        for name, *tensors in zip(names, wide, got, plain, strict=True):
            assert_close_to(*tensors, what=f"{name} of {call}")


OPTIONS = [
    {"normalize_weight": True},
    {"temperature": 0.7},
    {"vocab_size": 900},
    {"return_entropy": True},
    {"return_max_logit": True},
    {
        "normalize_weight": True,
        "temperature": 1.9,
        "vocab_size": 777,
        "return_entropy": True,
        "return_max_logit": True,
    },
]


def check_infinite_block(
    first: int, last: int, *, backend: str, plan: str, dtype: torch.dtype = torch.float32
) -> None:
    """Columns [first, last) at -inf: 0 probability, and no NaN in values or dweight."""
    case = make_case(20, 300)
    hidden_TD, weight_VD = case.hidden_TD.abs().to(dtype), case.weight_VD.to(dtype, copy=True)
    weight_VD[first:last] = -torch.inf
    outside = torch.cat([torch.arange(first), torch.arange(last, 300)])
    target_R = outside[case.target_R.clamp(min=0) % len(outside)]

    def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weight = leaf(weight_VD, dtype)
        logits_RV = hidden_TD.to(dtype)[case.row_R] @ weight.t()
        logp_R = torch.log_softmax(logits_RV, dim=1).gather(1, target_R[:, None])[:, 0]
        logp_R.backward(case.upstream_3R[0].to(dtype))
        return logp_R.detach(), weight.grad

    weight = leaf(weight_VD, dtype)
    logp_R = linear_logprob(
        hidden_TD, weight, case.row_R, target_R, backend=backend, plan=plan, workspace_mib=1
    ).logp_R
    logp_R.backward(case.upstream_3R[0])
    got = (logp_R.detach(), weight.grad)
    wanted = (plain(torch.float64), got, plain(dtype))
    for what, *tensors in zip(("logp", "dweight"), *wanted, strict=True):
        assert_close_to(*tensors, what=what)
