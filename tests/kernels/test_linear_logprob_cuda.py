"""linear_logprob's CUDA kernels in the emulator: the whole op against fp64, every option, both plans.

The emulator draws from a seed when threads run and asynchronous work lands; every launch has another seed.
Legend: T packed tokens, R response rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nova_kernels import linear_logprob
from nova_kernels.backend import triton_runs_on
from nova_kernels.linear_logprob.state import (
    Inputs,
    Options,
    RowGradients,
    merge,
    outputs,
    stacked,
)
from nova_kernels.testing import assert_close_to, poison
from tests.kernels import linear_logprob_cases as cases
from tests.kernels.emulated_linear_logprob import EmulatedKernels
from tests.kernels.emulation import ROOT

if not triton_runs_on(torch.device("cpu")):
    pytest.skip("Triton is not installed, or a GPU runs it", allow_module_level=True)

PLANS, make_case, leaf, ours = cases.PLANS, cases.make_case, cases.leaf, cases.ours
CUDA = {"backend": "cuda", "workspace_mib": 1}
EVERYTHING = cases.OPTIONS[-1]
BF16 = torch.bfloat16


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> EmulatedKernels:
    emulated = EmulatedKernels()
    monkeypatch.setattr(sys.modules["nova_kernels.linear_logprob"], "cuda_runs_on", lambda _: True)
    monkeypatch.setattr(cuda_path(), "cuda_kernels", lambda: emulated)
    return emulated


def cuda_path() -> ModuleType:
    return importlib.import_module("nova_kernels.linear_logprob._cuda")


def bf16_tensors(case: cases.Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return case.hidden_TD.bfloat16(), case.weight_VD.bfloat16(), case.row_R, case.target_R


def within(case: cases.Case, options: dict) -> cases.Case:
    return case._replace(target_R=case.target_R.clamp(max=options.get("vocab_size", 1 << 30) - 1))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "options", [{}, *cases.OPTIONS], ids=lambda options: "+".join(options) or "plain"
)
def test_options(options: dict, plan: str, kernels: EmulatedKernels) -> None:
    case = within(make_case(129, 1000, D=64), options)
    cases.check(case, BF16, call=CUDA | {"plan": plan}, **options)
    names = {"recompute": "linear_logprob_dlogits", "store": "linear_logprob_stored_dlogits"}
    assert kernels.launches == ["linear_logprob_fold", names[plan]]


@pytest.mark.parametrize(
    ("R", "V", "D"),
    [(0, 300, 64), (1, 1000, 64), (63, 257, 200), (300, 1000, 200), (257, 255, 8), (129, 512, 264)],
)
def test_sizes_beside_the_tiles(R: int, V: int, D: int, kernels: EmulatedKernels) -> None:
    """Less than a tile, one row too many, a step of the depth that hangs over, more steps than stages."""
    cases.check_calls(make_case(R, V, D=D), BF16, [CUDA | {"plan": plan} for plan in PLANS])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("seed", range(3))
def test_several_waves_and_rounds(
    plan: str, seed: int, kernels: EmulatedKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pairs of row tiles after one another, in two ranges; waves of two column tiles."""
    monkeypatch.setattr(cuda_path(), "split_rows", lambda *_, **__: (1, 2))
    monkeypatch.setattr(cuda_path(), "wave_width", lambda *_: 512)
    kernels.seed = 100 * seed
    case = within(make_case(300, 1000, D=72, seed=seed), EVERYTHING)
    cases.check(case, BF16, call=CUDA | {"plan": plan}, **EVERYTHING)
    assert len(kernels.launches) == 3


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("entropy", [False, True])
def test_extreme_logits(plan: str, entropy: bool, kernels: EmulatedKernels) -> None:
    case = make_case(40, 300, D=8)
    case = case._replace(
        hidden_TD=F.normalize(case.hidden_TD, dim=1) * 100.0,
        weight_VD=F.normalize(case.weight_VD, dim=1) * 100.0,
    )
    call = CUDA | {"plan": plan}
    cases.check(case, BF16, call=call, return_entropy=entropy)
    assert ours(case, BF16, **call)[0].min() < -1e4


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("block", [(0, 256), (256, 300), (40, 48)])
def test_a_block_of_minus_infinity(
    block: tuple[int, int], plan: str, kernels: EmulatedKernels
) -> None:
    cases.check_infinite_block(*block, backend="cuda", plan=plan, dtype=BF16)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("entropy", [False, True])
def test_a_sure_token_keeps_its_small_gradient(
    plan: str, entropy: bool, kernels: EmulatedKernels
) -> None:
    """p = 1 - 1e-5: dz of the target is g (1 - p); from a bf16 exponential it would be 0."""
    hidden_TD, weight_VD = torch.zeros(1, 8, dtype=BF16), torch.zeros(3, 8, dtype=BF16)
    hidden_TD[0, 0], weight_VD[0, 0] = 1.0, 11.5
    hidden_TD.requires_grad_()
    zero = torch.tensor([0])
    result = linear_logprob(
        hidden_TD, weight_VD, zero, zero, return_entropy=entropy, plan=plan, **CUDA
    )
    result.logp_R.backward()
    expected = 11.5 * (1.0 - torch.softmax(weight_VD.double()[:, 0], 0)[0])
    assert hidden_TD.grad is not None
    assert hidden_TD.grad[0, 0].item() == pytest.approx(expected.item(), rel=2.0**-7)


@pytest.mark.parametrize("plan", PLANS)
def test_a_tied_maximum_passes_its_gradient_to_the_first_column(
    plan: str, kernels: EmulatedKernels
) -> None:
    weight_VD = torch.zeros(700, 8, dtype=BF16)
    weight_VD[[270, 271, 273, 290, 690], 0] = 2.0  # in one thread, in two, in two tiles and ranges
    weight_VD.requires_grad_()
    hidden_TD, zero = torch.zeros(1, 8, dtype=BF16), torch.tensor([0])
    hidden_TD[0, 0] = 1.0
    result = linear_logprob(
        hidden_TD, weight_VD, zero, zero, return_max_logit=True, plan=plan, **CUDA
    )
    assert result.max_logit_R is not None
    result.max_logit_R.backward(torch.ones(1))
    assert weight_VD.grad is not None
    assert weight_VD.grad[:, 0].nonzero()[:, 0].tolist() == [270]
    assert weight_VD.grad[270, 0] == 1.0


@pytest.mark.parametrize("plan", PLANS)
def test_all_rows_ignored(plan: str, kernels: EmulatedKernels) -> None:
    case = make_case(20, 200, ignored=1.1)
    options = {"return_entropy": True, "return_max_logit": True}
    for tensor in ours(case, BF16, plan=plan, **options, **CUDA):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_nan_in_unused_places_stays_there(
    plan: str, options: dict, kernels: EmulatedKernels
) -> None:
    """Hidden states that no counted row reads, and weights behind vocab_size."""
    options = options | {"vocab_size": 277, "plan": plan} | CUDA
    case = within(make_case(40, 300, T=120), options)
    clean = ours(case, BF16, **options)
    unread_T = torch.ones(120, dtype=torch.bool)
    unread_T[case.row_R[case.target_R != -100]] = False
    assert unread_T[case.row_R].any()  # some ignored row reads one
    case.hidden_TD[unread_T] = float("nan")
    case.weight_VD[277:] = float("nan")
    for before, after in zip(clean, ours(case, BF16, **options), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("options", [{}, {"return_entropy": True}], ids=["plain", "entropy"])
def test_a_nan_that_counts_is_seen(plan: str, options: dict, kernels: EmulatedKernels) -> None:
    case = make_case(20, 300)
    case.hidden_TD[case.row_R[case.target_R != -100][0]] = float("nan")
    *_, dweight_VD = out = ours(case, BF16, plan=plan, **options, **CUDA)
    assert out[0].isnan().any() and dweight_VD.isnan().any()


@pytest.mark.parametrize("plan", PLANS)
def test_bits_do_not_depend_on_run_or_number_of_clusters(
    plan: str, kernels: EmulatedKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = within(make_case(300, 600), {"vocab_size": 590})
    options = EVERYTHING | CUDA | {"plan": plan, "vocab_size": 590}
    first = ours(case, BF16, **options)
    for clusters, seed in ((2, 7), (1, 8), (5, 9)):
        kernels.seed = seed
        monkeypatch.setattr(cuda_path(), "_num_clusters", lambda _, n=clusters: n)
        for one, other in zip(first, ours(case, BF16, **options), strict=True):
            assert torch.equal(one, other), (clusters, seed)


def test_values_have_the_same_bits_with_every_plan_and_option(kernels: EmulatedKernels) -> None:
    """A reference model's pass without gradients then equals the policy's first one, to the last bit."""
    case = make_case(63, 600)
    with torch.no_grad():
        inferred = linear_logprob(*bf16_tensors(case), **CUDA).logp_R
    for plan, entropy, top in itertools.product(PLANS, (False, True), (False, True)):
        options = {"plan": plan, "return_entropy": entropy, "return_max_logit": top}
        assert torch.equal(inferred, ours(case, BF16, **options, **CUDA)[0]), options


@pytest.mark.parametrize("plan", PLANS)
def test_a_second_backward_finds_everything_as_it_was(plan: str, kernels: EmulatedKernels) -> None:
    case = make_case(40, 300)
    hidden_TD, weight_VD = leaf(case.hidden_TD, BF16), leaf(case.weight_VD, BF16)
    logp_R = linear_logprob(
        hidden_TD, weight_VD, case.row_R, case.target_R, plan=plan, **CUDA
    ).logp_R
    once, twice = (
        torch.autograd.grad(logp_R, (hidden_TD, weight_VD), case.upstream_3R[0], retain_graph=True)
        for _ in range(2)
    )
    assert all(map(torch.equal, once, twice))


@pytest.mark.parametrize("trained", ["hidden", "weight"])
@pytest.mark.parametrize("plan", PLANS)
def test_gradient_of_one_input_alone(plan: str, trained: str, kernels: EmulatedKernels) -> None:
    case = make_case(20, 200)
    both = ours(case, BF16, plan=plan, **CUDA)
    tensors = {"hidden": leaf(case.hidden_TD, BF16), "weight": leaf(case.weight_VD, BF16)}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == trained)
    logp_R = linear_logprob(*tensors.values(), case.row_R, case.target_R, plan=plan, **CUDA).logp_R
    logp_R.backward(case.upstream_3R[0])
    gradient = tensors[trained].grad
    assert gradient is not None
    assert torch.equal(gradient, both[1 if trained == "hidden" else 2])


@pytest.mark.parametrize("store", [False, True])
def test_shards_of_the_vocabulary_add_up(store: bool, kernels: EmulatedKernels) -> None:
    """As two ranks would: states merge, dhidden adds, dweight is each shard's own."""
    case = make_case(70, 560, D=24)
    dtype_case = case._replace(hidden_TD=case.hidden_TD.to(BF16), weight_VD=case.weight_VD.to(BF16))
    asked = {"return_entropy": True, "return_max_logit": True}
    wide, plain = (
        cases.dense(dtype_case, torch.float64, **asked),
        cases.dense(dtype_case, BF16, **asked),
    )
    shards, folded = [], []
    for first, columns in ((0, 280), (280, 280)):
        weight_VD = dtype_case.weight_VD[first : first + 280].clone()
        inputs = Inputs(dtype_case.hidden_TD, weight_VD, case.row_R, case.target_R)
        options = Options(first, columns, False, 1.0, True, True, 1 << 20, None)
        shards.append((inputs, options))
        with poison():
            folded.append(cuda_path().forward(inputs, options, store=store))
    state = merge(stacked([one for one, _ in folded]))
    ignored_R = case.target_R == -100
    upstream = (gradient_R.masked_fill(ignored_R, 0.0) for gradient_R in case.upstream_3R)
    gradients = RowGradients(*upstream)
    parts = [
        cuda_path().backward(
            *(inputs, state, stored, gradients, options), needs_dhidden=True, needs_dweight=True
        )
        for (inputs, options), (_, stored) in zip(shards, folded, strict=True)
    ]
    got = [*outputs(state, ignored_R), parts[0][0].float() + parts[1][0].float()]
    got.append(torch.cat([parts[0][1], parts[1][1]]))
    got[-2] = got[-2].to(BF16)
    for what, *tensors in zip(
        ("logp", "entropy", "max", "dhidden", "dweight"), wide, got, plain, strict=True
    ):
        assert_close_to(*tensors, what=what)


def test_auto_stays_with_the_reference(
    kernels: EmulatedKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the kernels have passed their tests on a GPU."""

    def unproven(*_: object, **__: object) -> None:
        raise AssertionError("auto chose CUDA")

    monkeypatch.setattr(cuda_path(), "forward", unproven)
    case = make_case(5, 50)
    tensors = bf16_tensors(case)
    linear_logprob(*tensors)
    with pytest.raises(AssertionError, match="auto chose"):
        linear_logprob(*tensors, backend="cuda")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda h, w: (h.float(), w.float()), "both in bf16"),
        (lambda h, w: (h, w.float()), "both in bf16"),
        (lambda h, w: (h, w.t().contiguous().t()), "contiguous"),
        (lambda h, w: (h[:, :12].contiguous(), w[:, :12].contiguous()), "multiples of 16 bytes"),
        (lambda h, w: (h, F.pad(w.flatten(), (1, 0))[1:].view_as(w)), "multiples of 16 bytes"),
    ],
)
def test_broken_rules_are_named(change, rule: str, kernels: EmulatedKernels) -> None:
    case = make_case(5, 50)
    hidden_TD, weight_VD = change(case.hidden_TD.bfloat16(), case.weight_VD.bfloat16())
    with pytest.raises(ValueError, match=rf"backend='cuda' cannot run here.*cuda needs.*{rule}"):
        linear_logprob(hidden_TD, weight_VD, *case[2:4], backend="cuda")


def test_without_a_hopper_gpu_cuda_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend='cuda' cannot run here.*Hopper GPU \(sm_90\)"):
        linear_logprob(*make_case(5, 50)[:4], backend="cuda")


def test_a_tile_has_the_sizes_that_the_kernels_have() -> None:
    source = (ROOT / "csrc/cuda/linear_logprob/work.h").read_text()
    assert f"kM = {cuda_path().TILE_ROWS}, kN = {cuda_path().TILE_COLUMNS}," in source
