"""linear_logprob against a dense fp64 log_softmax: values, every gradient and option, both plans.

Legend: T packed tokens, R response rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nova_kernels import linear_logprob
from nova_kernels.linear_logprob import reference
from nova_kernels.linear_logprob.state import Options
from nova_kernels.testing import seeded_normal

spec = importlib.util.spec_from_file_location(
    "linear_logprob_cases", Path(__file__).with_name("linear_logprob_cases.py")
)
assert spec is not None and spec.loader is not None
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)
OPTIONS, PLANS = cases.OPTIONS, cases.PLANS
make_case, leaf, ours, check, check_calls = (
    cases.make_case,
    cases.leaf,
    cases.ours,
    cases.check,
    cases.check_calls,
)


@pytest.fixture
def narrow_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four columns per wave, so that tiny problems have many."""

    def waves(x_RD: Tensor, options: Options) -> list[tuple[int, int]]:
        steps = range(0, options.num_columns if len(x_RD) else 0, 4)
        return [(start, min(start + 4, options.num_columns)) for start in steps]

    monkeypatch.setattr(reference, "column_waves", waves)


@pytest.mark.parametrize("V", [1000, 32003])
@pytest.mark.parametrize("R", [0, 1, 63, 1000])
def test_fp32_values_and_gradients(R: int, V: int) -> None:
    """One MiB means 126 waves at the largest size, 256 MiB one."""
    calls = [{"plan": "recompute", "workspace_mib": 1}, {"plan": "store", "workspace_mib": 256}]
    check_calls(make_case(R, V), torch.float32, calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options))
def test_options(options: dict, plan: str, dtype: torch.dtype) -> None:
    case = make_case(63, 1000, D=32)
    vocab_size = options.get("vocab_size", 1000)
    case = case._replace(target_R=case.target_R.clamp(max=vocab_size - 1))
    check(case, dtype, call={"plan": plan}, **options)


@pytest.mark.parametrize("plan", PLANS)
def test_bf16_with_many_rows(plan: str) -> None:
    check(make_case(500, 4096, D=64), torch.bfloat16, call={"plan": plan, "workspace_mib": 2})


@pytest.mark.parametrize("waves", ["one", "many"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "options", [{}, *OPTIONS], ids=lambda options: "+".join(options) or "plain"
)
def test_gradcheck(options: dict, plan: str, waves: str, request: pytest.FixtureRequest) -> None:
    if waves == "many":
        request.getfixturevalue("narrow_waves")
    options = options | ({"vocab_size": 9} if "vocab_size" in options else {})
    hidden_TD = seeded_normal(5, 4, seed=1, dtype=torch.float64).requires_grad_()
    weight_VD = seeded_normal(11, 4, seed=2, dtype=torch.float64).requires_grad_()
    row_R, target_R = torch.tensor([4, 0, 0, 2]), torch.tensor([8, -100, 3, 0])

    def outputs(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, ...]:
        result = linear_logprob(hidden_TD, weight_VD, row_R, target_R, plan=plan, **options)
        return tuple(out for out in result if out is not None)

    assert torch.autograd.gradcheck(outputs, (hidden_TD, weight_VD))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("entropy", [False, True])
def test_extreme_logits(plan: str, entropy: bool) -> None:
    """Logits of +-1e4: probabilities of exactly 0 and 1, and nothing but finite numbers."""
    case = make_case(63, 1000, D=8)
    case = case._replace(
        hidden_TD=F.normalize(case.hidden_TD, dim=1) * 100.0,
        weight_VD=F.normalize(case.weight_VD, dim=1) * 100.0,
    )
    check(case, torch.float32, call={"plan": plan}, return_entropy=entropy)
    assert ours(case, torch.float32, plan=plan)[0].min() < -1e4


@pytest.mark.parametrize("plan", PLANS)
def test_a_sure_token_keeps_its_small_gradient(plan: str) -> None:
    """p = 1 - 1e-5: dz of the target is g (1 - p), formed without cancellation beyond fp32's."""
    hidden_TD = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight_VD = torch.tensor([[11.5, 1.0], [0.0, 1.0], [0.0, 1.0]])
    zero = torch.tensor([0])
    linear_logprob(hidden_TD, weight_VD, zero, zero, plan=plan).logp_R.backward()
    expected = 11.5 * (1.0 - torch.softmax(weight_VD.double()[:, 0], 0)[0])
    assert hidden_TD.grad[0, 0].item() == pytest.approx(expected.item(), abs=11.5 * 1.2e-7)


@pytest.mark.parametrize("plan", PLANS)
def test_a_tied_maximum_passes_its_gradient_to_the_first_column(
    plan: str, narrow_waves: None
) -> None:
    weight_VD = torch.tensor([[1.0], [2.0], [2.0], [0.0], [0.0], [2.0]], requires_grad=True)
    zero = torch.tensor([0])
    result = linear_logprob(
        torch.ones(1, 1), weight_VD, zero, zero, return_max_logit=True, plan=plan
    )
    result.max_logit_R.backward(torch.ones(1))
    assert weight_VD.grad[:, 0].tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("plan", PLANS)
def test_all_rows_ignored(plan: str) -> None:
    case = make_case(63, 1000, ignored=1.1)
    options = {"return_entropy": True, "return_max_logit": True}
    for tensor in ours(case, torch.float32, plan=plan, **options):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("block", [(0, 8), (150, 158), (292, 300)])
def test_a_block_of_minus_infinity(block: tuple[int, int], plan: str, narrow_waves: None) -> None:
    cases.check_infinite_block(*block, backend="reference", plan=plan)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("entropy", [False, True])
def test_nan_in_unused_places_stays_there(plan: str, entropy: bool) -> None:
    """Hidden states that no counted row reads, and weights behind vocab_size."""
    case = make_case(63, 1000, T=200)
    case = case._replace(target_R=case.target_R.clamp(max=899))
    options = {"vocab_size": 900, "plan": plan, "return_entropy": entropy}
    clean = ours(case, torch.float32, **options)
    unread_T = torch.ones(200, dtype=torch.bool)
    unread_T[case.row_R[case.target_R != -100]] = False
    assert unread_T[case.row_R].any()  # some ignored row reads one
    case.hidden_TD[unread_T] = float("nan")
    case.weight_VD[900:] = float("nan")
    for before, after in zip(clean, ours(case, torch.float32, **options), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("plan", PLANS)
def test_no_rows_give_zero_gradients_in_the_graph(plan: str) -> None:
    case = make_case(0, 50)
    options = {"return_entropy": True, "return_max_logit": True}
    logp_R, entropy_R, max_logit_R, dhidden_TD, dweight_VD = ours(
        case, torch.float32, plan=plan, **options
    )
    assert logp_R.shape == entropy_R.shape == max_logit_R.shape == (0,)
    assert torch.equal(dhidden_TD, torch.zeros_like(case.hidden_TD))
    assert torch.equal(dweight_VD, torch.zeros_like(case.weight_VD))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("entropy", [False, True])
def test_runs_and_repeated_backwards_are_bit_identical(plan: str, entropy: bool) -> None:
    case = make_case(500, 1000)
    options = {"plan": plan, "return_entropy": entropy}
    first, second = (ours(case, torch.float32, **options) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    weight_VD = case.weight_VD.requires_grad_()
    logp_R = linear_logprob(case.hidden_TD, weight_VD, case.row_R, case.target_R, **options).logp_R
    again = [
        torch.autograd.grad(logp_R, weight_VD, case.upstream_3R[0], retain_graph=True)[0]
        for _ in range(2)
    ]
    assert torch.equal(*again)


def test_plans_agree_and_inference_gives_the_same_values() -> None:
    case = make_case(500, 1000)
    options = {"return_entropy": True, "return_max_logit": True}
    trained = [ours(case, torch.float32, plan=plan, **options)[:3] for plan in PLANS]
    with torch.no_grad():
        inferred = linear_logprob(
            case.hidden_TD, case.weight_VD.requires_grad_(), case.row_R, case.target_R, **options
        )
    assert inferred.logp_R.grad_fn is None
    for one, other, third in zip(*trained, inferred, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_dtypes_of_results() -> None:
    case = make_case(10, 50)
    for hidden, weight, result in (
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
    ):
        hidden_TD, weight_VD = leaf(case.hidden_TD, hidden), leaf(case.weight_VD, weight)
        logp_R = linear_logprob(hidden_TD, weight_VD, case.row_R, case.target_R).logp_R
        logp_R.sum().backward()
        assert (logp_R.dtype, hidden_TD.grad.dtype, weight_VD.grad.dtype) == (
            result,
            hidden,
            weight,
        )


@pytest.mark.parametrize("trained", ["hidden", "weight"])
@pytest.mark.parametrize("plan", PLANS)
def test_gradient_of_one_input_alone(plan: str, trained: str) -> None:
    case = make_case(63, 1000)
    both = ours(case, torch.float32, plan=plan)
    tensors = {"hidden": case.hidden_TD.clone(), "weight": case.weight_VD.clone()}
    tensors[trained].requires_grad_()
    logp_R = linear_logprob(*tensors.values(), case.row_R, case.target_R, plan=plan).logp_R
    logp_R.backward(case.upstream_3R[0])
    assert torch.equal(tensors[trained].grad, both[1 if trained == "hidden" else 2])


def test_autocast_changes_nothing() -> None:
    case = make_case(63, 1000)
    results = []
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            results.append(linear_logprob(*case[:4]).logp_R)
    assert torch.equal(*results)


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest storage that any operation returned."""

    def __init__(self, ignore: set[int]) -> None:
        super().__init__()
        self.num_bytes, self._ignore = 0, ignore

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.nbytes() not in self._ignore:
                    self.num_bytes = max(self.num_bytes, storage.nbytes())
        return out


def test_memory_of_the_plans() -> None:
    """recompute: no tensor above the workspace for any number of rows; auto stores what fits it."""
    V, D, workspace_mib = 10_000, 4, 2
    largest = {}
    for R, plan in ((40, "auto"), (60, "auto"), (500, "recompute"), (2000, "recompute")):
        case = make_case(R, V, D=D)
        hidden_TD, weight_VD = case.hidden_TD.requires_grad_(), case.weight_VD.requires_grad_()
        with LargestTensor(ignore={weight_VD.nbytes, hidden_TD.nbytes}) as seen:
            logp_R = linear_logprob(
                hidden_TD, weight_VD, *case[2:4], plan=plan, workspace_mib=workspace_mib
            ).logp_R
            logp_R.sum().backward()
        largest[R] = seen.num_bytes
    assert largest[40] == 40 * V * 4  # the store
    assert all(0.8 < largest[R] / (workspace_mib << 20) <= 1.0 for R in (60, 500, 2000)), largest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"row_R": torch.tensor([0, 80])}, r"row_R spans \[0, 80\].*\[0, 80\)"),
        ({"row_R": torch.tensor([-1, 0])}, r"row_R spans \[-1, 0\]"),
        ({"target_R": torch.tensor([0, 50])}, r"target_R holds 50.*\[0, 50\)"),
        ({"target_R": torch.tensor([-1, 0])}, "target_R holds -1"),
        ({"target_R": torch.tensor([0, 0, 0])}, "target_R has shape"),
        ({"target_R": torch.tensor([0.0, 0.0])}, "target_R has dtype"),
        ({"weight_VD": torch.zeros(50, 3)}, "weight_VD has shape"),
        ({"vocab_size": 51}, "vocab_size is 51"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"plan": "fast"}, "plan is 'fast'.*recompute"),
        ({"workspace_mib": 0}, "workspace_mib is 0"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_mistakes_are_explained(change: dict, words: str) -> None:
    arguments = {
        "hidden_TD": torch.zeros(80, 16),
        "weight_VD": torch.zeros(50, 16),
        "row_R": torch.tensor([0, 79]),
        "target_R": torch.tensor([0, 49]),
    }
    linear_logprob(**arguments)
    with pytest.raises(ValueError, match=words):
        linear_logprob(**(arguments | change))
