"""linear_logprob's Triton kernels in Triton's interpreter: against fp64, every option, both plans.

The interpreter runs one program after another, so nothing here shows a race; test_linear_logprob_gpu
is for that. Legend: T packed tokens, R response rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nova_kernels import linear_dpo_loss, linear_logprob
from nova_kernels.backend import triton_runs_on
from nova_kernels.linear_logprob._triton_tiles import Tile, choose_tile
from nova_kernels.testing import assert_close_to, poison, seeded_normal

if not triton_runs_on(torch.device("cpu")):
    pytest.skip("Triton is not installed, or a GPU runs it", allow_module_level=True)

spec = importlib.util.spec_from_file_location(
    "linear_logprob_cases", Path(__file__).with_name("linear_logprob_cases.py")
)
assert spec is not None and spec.loader is not None
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)
PLANS, make_case, leaf, ours = cases.PLANS, cases.make_case, cases.leaf, cases.ours
TRITON = {"backend": "triton", "workspace_mib": 1}
EVERYTHING = {
    "normalize_weight": True,
    "temperature": 1.9,
    "vocab_size": 277,
    "return_entropy": True,
    "return_max_logit": True,
}
OPTIONS = [
    {},
    {"normalize_weight": True},
    {"temperature": 0.7, "vocab_size": 270},
    {"return_entropy": True},
    {"return_max_logit": True},
    EVERYTHING,
]


def module(name: str) -> ModuleType:
    """One that needs Triton."""
    return importlib.import_module(f"nova_kernels.linear_logprob.{name}")


@pytest.fixture
def triton_path() -> ModuleType:
    return module("_triton")


@pytest.fixture
def small_tiles(triton_path: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of rows, columns, depth and wave in problems that the interpreter can bear."""
    tile = Tile(rows=16, columns=64, depth=16, warps=4, stages=2)
    monkeypatch.setattr(triton_path, "choose_tile", lambda *_, **__: tile)
    monkeypatch.setattr(triton_path, "wave_width", lambda *_: 128)
    monkeypatch.setattr(triton_path, "split_rows", lambda *_: (2, 3))


def within(case: cases.Case, options: dict) -> cases.Case:
    return case._replace(target_R=case.target_R.clamp(max=options.get("vocab_size", 1 << 30) - 1))


@pytest.mark.parametrize("R", [0, 1, 63])
def test_fp32_values_and_gradients(R: int) -> None:
    calls = [TRITON | {"plan": plan} for plan in PLANS]
    cases.check_calls(make_case(R, 1000), torch.float32, calls)


@pytest.mark.parametrize("plan", PLANS)
def test_many_rows(plan: str) -> None:
    """One MiB of workspace holds 256 columns: two waves."""
    cases.check(make_case(1000, 300), torch.float32, call=TRITON | {"plan": plan})


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("R", [1, 63])
def test_a_large_vocabulary_of_odd_size(R: int, plan: str) -> None:
    cases.check(make_case(R, 32003), torch.float32, call=TRITON | {"plan": plan})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
def test_options(options: dict, plan: str, dtype: torch.dtype, small_tiles: None) -> None:
    case = within(make_case(40, 300, D=24, T=30), options)
    cases.check(case, dtype, call=TRITON | {"plan": plan}, **options)


@pytest.mark.parametrize("D", [4, 16, 20, 32])
def test_hidden_sizes_beside_the_tile(D: int, small_tiles: None) -> None:
    """20 and 4: the last step of the product hangs over; the rows behind must not leak in."""
    calls = [TRITON | {"plan": plan} for plan in PLANS]
    cases.check_calls(make_case(20, 130, D=D, T=11), torch.float32, calls, normalize_weight=True)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("entropy", [False, True])
def test_extreme_logits(plan: str, entropy: bool, small_tiles: None) -> None:
    case = make_case(40, 300, D=8)
    case = case._replace(
        hidden_TD=F.normalize(case.hidden_TD, dim=1) * 100.0,
        weight_VD=F.normalize(case.weight_VD, dim=1) * 100.0,
    )
    call = TRITON | {"plan": plan}
    cases.check(case, torch.float32, call=call, return_entropy=entropy)
    assert ours(case, torch.float32, **call)[0].min() < -1e4


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("block", [(0, 64), (128, 192), (256, 300)])
def test_a_block_of_minus_infinity(block: tuple[int, int], plan: str, small_tiles: None) -> None:
    cases.check_infinite_block(*block, backend="triton", plan=plan)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sure_token_keeps_its_small_gradient(plan: str, dtype: torch.dtype) -> None:
    """p = 1 - 1e-5: dz of the target is g (1 - p); from a bf16 exponential it would be 0."""
    hidden_TD = torch.zeros(1, 8, dtype=dtype)
    hidden_TD[0, 0] = 1.0
    weight_VD = torch.zeros(3, 8, dtype=dtype)
    weight_VD[0, 0] = 11.5
    hidden_TD.requires_grad_()
    zero = torch.tensor([0])
    logp_R = linear_logprob(hidden_TD, weight_VD, zero, zero, **TRITON, plan=plan).logp_R
    logp_R.backward()
    expected = 11.5 * (1.0 - torch.softmax(weight_VD.double()[:, 0], 0)[0])
    rounding = 2.0**-8 * expected if dtype == torch.bfloat16 else 11.5 * 1.2e-7
    assert hidden_TD.grad[0, 0].item() == pytest.approx(expected.item(), abs=float(rounding))


@pytest.mark.parametrize("plan", PLANS)
def test_a_tied_maximum_passes_its_gradient_to_the_first_column(
    plan: str, small_tiles: None
) -> None:
    weight_VD = torch.zeros(200, 4)
    weight_VD[[70, 71, 150, 199], 0] = 2.0  # within a tile, over tiles, over ranges
    weight_VD.requires_grad_()
    hidden_TD, zero = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([0])
    result = linear_logprob(
        hidden_TD, weight_VD, zero, zero, return_max_logit=True, plan=plan, **TRITON
    )
    result.max_logit_R.backward(torch.ones(1))
    assert weight_VD.grad[:, 0].nonzero()[:, 0].tolist() == [70]
    assert weight_VD.grad[70, 0] == 1.0


@pytest.mark.parametrize("plan", PLANS)
def test_all_rows_ignored(plan: str, small_tiles: None) -> None:
    case = make_case(20, 200, ignored=1.1)
    options = {"return_entropy": True, "return_max_logit": True}
    for tensor in ours(case, torch.float32, plan=plan, **options, **TRITON):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_nan_in_unused_places_stays_there(plan: str, options: dict, small_tiles: None) -> None:
    """Hidden states that no counted row reads, and weights behind vocab_size."""
    options = options | {"vocab_size": 277, "plan": plan} | TRITON
    case = within(make_case(40, 300, T=120), options)
    clean = ours(case, torch.float32, **options)
    unread_T = torch.ones(120, dtype=torch.bool)
    unread_T[case.row_R[case.target_R != -100]] = False
    assert unread_T[case.row_R].any()  # some ignored row reads one
    case.hidden_TD[unread_T] = float("nan")
    case.weight_VD[277:] = float("nan")
    for before, after in zip(clean, ours(case, torch.float32, **options), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("options", [{}, {"return_entropy": True}], ids=["plain", "entropy"])
def test_a_nan_that_counts_is_seen(options: dict, small_tiles: None) -> None:
    case = within(make_case(20, 300), options)
    case.hidden_TD[case.row_R[case.target_R != -100][0]] = float("nan")
    *_, dweight_VD = out = ours(case, torch.float32, **options, **TRITON)
    assert out[0].isnan().any() and dweight_VD.isnan().any()


@pytest.mark.parametrize("plan", PLANS)
def test_bits_do_not_depend_on_run_or_number_of_programs(
    plan: str, small_tiles: None, triton_path: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(100, 300)
    options = EVERYTHING | TRITON | {"plan": plan, "vocab_size": 300}
    first, again = (ours(case, torch.float32, **options) for _ in range(2))
    monkeypatch.setattr(triton_path, "_num_programs", lambda items, _: min(items, 7))
    other_grid = ours(case, torch.float32, **options)
    for one, two, three in zip(first, again, other_grid, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("plan", PLANS)
def test_a_second_backward_finds_everything_as_it_was(plan: str, small_tiles: None) -> None:
    case = make_case(40, 300)
    hidden_TD, weight_VD = leaf(case.hidden_TD, torch.float32), leaf(case.weight_VD, torch.float32)
    logp_R = linear_logprob(
        hidden_TD, weight_VD, case.row_R, case.target_R, plan=plan, **TRITON
    ).logp_R
    once, twice = (
        torch.autograd.grad(logp_R, (hidden_TD, weight_VD), case.upstream_3R[0], retain_graph=True)
        for _ in range(2)
    )
    assert all(map(torch.equal, once, twice))


def test_plans_and_inference_give_the_same_values(small_tiles: None) -> None:
    case = make_case(63, 300)
    recompute, store = (ours(case, torch.float32, plan=plan, **TRITON)[0] for plan in PLANS)
    with torch.no_grad():
        inferred = linear_logprob(*case[:4], **TRITON).logp_R
    assert torch.equal(recompute, store)
    assert torch.equal(recompute, inferred)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
@pytest.mark.parametrize("plan", PLANS)
def test_gradient_of_one_input_alone(plan: str, trained: str, small_tiles: None) -> None:
    case = make_case(20, 200)
    both = ours(case, torch.float32, plan=plan, **TRITON)
    tensors = {"hidden": case.hidden_TD.clone(), "weight": case.weight_VD.clone()}
    tensors[trained].requires_grad_()
    logp_R = linear_logprob(
        *tensors.values(), case.row_R, case.target_R, plan=plan, **TRITON
    ).logp_R
    logp_R.backward(case.upstream_3R[0])
    assert torch.equal(tensors[trained].grad, both[1 if trained == "hidden" else 2])


@pytest.mark.parametrize("rows", ["repeated", "one", "sorted"])
def test_sum_rows(rows: str) -> None:
    """Bits of the sum in the order of row_R, also where one token has every row.

    In fp16: the interpreter cuts fp32 off to bf16 instead of rounding it.
    """
    T, D, R = 130, 70, 200
    dx_RD = seeded_normal(R, D, seed=1)
    row_R = torch.randint(0, T, (R,), generator=torch.Generator().manual_seed(2))
    row_R = {"repeated": row_R, "one": torch.full_like(row_R, 77), "sorted": row_R.sort()[0]}[rows]
    like = torch.empty(T, D, dtype=torch.float16)
    with poison():
        got = module("_triton_rows").sum_rows(dx_RD, row_R, like=like)
    wanted = torch.zeros(T, D).index_add_(0, row_R, dx_RD)  # on a CPU: in order
    assert torch.equal(got, wanted.half())


@pytest.mark.parametrize("programs", [132, 66])
def test_split_rows(programs: int) -> None:
    """Every program has work, the rows of a round fit L2, and 128 programs of 132 are busy."""
    split_rows = module("_waves").split_rows
    for row_tiles, column_tiles, megabytes in itertools.product(
        (1, 2, 16, 64, 257, 1000), (1, 7, 501, 594), (1, 2, 40)
    ):
        group, splits = split_rows(row_tiles, column_tiles, megabytes << 20, programs)
        assert 1 <= group <= row_tiles and 1 <= splits <= column_tiles
        assert group * splits <= programs
        assert group == 1 or group * megabytes <= 32
    # 8192 rows of D = 4096, V = 128256; one by one, and in clusters of two
    assert split_rows(64, 501, 1 << 20) == (32, 4)
    assert split_rows(32, 501, 2 << 20, 66) == (16, 4)


def test_tiles_by_dtype_and_rows() -> None:
    assert choose_tile(8192, 2, crowded=False).columns == 256
    assert choose_tile(8192, 2, crowded=True).columns == 128
    assert choose_tile(1, 2, crowded=True).rows == 64
    assert choose_tile(8192, 4, crowded=True).depth == 32


def test_linear_dpo_loss_agrees_with_the_reference(small_tiles: None) -> None:
    case = make_case(40, 300)
    sequence_R = torch.arange(40) % 4
    results = []
    for dtype, backend in (
        (torch.float64, "reference"),
        (torch.float32, "triton"),
        (torch.float32, "reference"),
    ):
        hidden_TD, weight_VD = leaf(case.hidden_TD, dtype), leaf(case.weight_VD, dtype)
        loss = linear_dpo_loss(
            hidden_TD, weight_VD, case.row_R, case.target_R, sequence_R,
            torch.full((4,), -50.0), beta=0.1, backend=backend,
        ).loss_sum  # fmt: skip
        loss.backward()
        results.append((loss.detach(), hidden_TD.grad, weight_VD.grad))
    for tensors in zip(*results, strict=True):
        assert_close_to(*tensors)


def test_auto_stays_with_the_reference(
    triton_path: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the kernels have passed their tests on a GPU."""

    def unproven(*_: object, **__: object) -> None:
        raise AssertionError("auto chose Triton")

    monkeypatch.setattr(triton_path, "forward", unproven)
    case = make_case(5, 50)
    linear_logprob(*case[:4])
    with pytest.raises(AssertionError, match="auto chose"):
        linear_logprob(*case[:4], backend="triton")


def misaligned(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.numel() + 1)[1:].view(tensor.shape)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda h, w: (h.double(), w.double()), "both in bf16, fp16 or fp32"),
        (lambda h, w: (h.bfloat16(), w), "both in bf16, fp16 or fp32"),
        (lambda h, w: (h, w.t().contiguous().t()), "contiguous"),
        (lambda h, w: (h[:, :6].contiguous(), w[:, :6].contiguous()), "multiples of 16 bytes"),
        (lambda h, w: (h, misaligned(w)), "multiples of 16 bytes"),
    ],
)
def test_broken_rules_are_named(change, rule: str) -> None:
    case = make_case(5, 50)
    hidden_TD, weight_VD = change(case.hidden_TD, case.weight_VD)
    linear_logprob(hidden_TD, weight_VD, *case[2:4])
    with pytest.raises(ValueError, match=rf"backend='triton' cannot run here.*{rule}"):
        linear_logprob(hidden_TD, weight_VD, *case[2:4], backend="triton")


def test_without_interpreter_or_gpu_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="needs a CUDA device, or TRITON_INTERPRET=1"):
        linear_logprob(*make_case(5, 50)[:4], backend="triton")
