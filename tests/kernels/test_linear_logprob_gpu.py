"""linear_logprob's Triton and CUDA kernels on a GPU, in bf16 and at the sizes that they are for.

When all of these have passed on an H100, `_implementation` may let "auto" choose one of them there.
Legend: T packed tokens, R response rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nova_kernels import linear_logprob
from nova_kernels.testing import assert_close_to

pytestmark = pytest.mark.gpu
spec = importlib.util.spec_from_file_location(
    "linear_logprob_cases", Path(__file__).with_name("linear_logprob_cases.py")
)
assert spec is not None and spec.loader is not None
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)
PLANS = cases.PLANS
BACKENDS = os.environ.get("NOVA_GPU_BACKENDS", "triton,cuda").split(",")  # one may hang the GPU
DTYPES = [
    (backend, dtype)
    for backend in BACKENDS
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    if backend == "triton" or dtype == torch.bfloat16
]


def gpu_case(R: int, V: int, **sizes: int) -> cases.Case:
    """Hidden states scaled so that logits are of a few units, as in a trained model."""
    case = cases.make_case(R, V, **sizes)
    scale = 3.0 / case.hidden_TD.shape[1] ** 0.5
    return cases.Case(*(t.cuda() for t in case._replace(hidden_TD=case.hidden_TD * scale)))


def results(case: cases.Case, backend: str, **options) -> list[Tensor]:
    return cases.ours(case, torch.bfloat16, backend=backend, **options)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("V", [128256, 151936])
@pytest.mark.parametrize("R", [1, 63, 1000])
def test_bf16_at_full_vocabulary(R: int, V: int, plan: str) -> None:
    """256 MiB: several waves at R = 1000."""
    calls = [{"plan": plan, "backend": backend} for backend in BACKENDS]
    cases.check_calls(gpu_case(R, V, D=1024, T=700), torch.bfloat16, calls)


@pytest.mark.parametrize(("backend", "dtype"), DTYPES)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "options", [{}, *cases.OPTIONS], ids=lambda options: "+".join(options) or "plain"
)
@pytest.mark.parametrize("R", [40, 500])
def test_options(R: int, options: dict, plan: str, backend: str, dtype: torch.dtype) -> None:
    case = gpu_case(R, 1000, D=200)
    case = case._replace(target_R=case.target_R.clamp(max=options.get("vocab_size", 1000) - 1))
    call = {"plan": plan, "backend": backend, "workspace_mib": 1}
    cases.check(case, dtype, call=call, **options)


@pytest.mark.parametrize("V", [255, 256, 257, 511, 513, 32003])
@pytest.mark.parametrize("R", [0, 1, 64, 65, 127, 129, 257])
def test_sizes_around_the_tiles(R: int, V: int) -> None:
    calls = [
        {"plan": plan, "backend": backend, "workspace_mib": 1}
        for plan, backend in itertools.product(PLANS, BACKENDS)
    ]
    cases.check_calls(gpu_case(R, V, D=136), torch.bfloat16, calls)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plan", PLANS)
def test_nan_in_unused_places_stays_there(plan: str, backend: str) -> None:
    case = gpu_case(300, 1000, D=128, T=600)
    case = case._replace(target_R=case.target_R.clamp(max=899))
    options = {"vocab_size": 900, "plan": plan, "return_entropy": True}
    clean = results(case, backend, **options)
    unread_T = torch.ones(600, dtype=torch.bool, device="cuda")
    unread_T[case.row_R[case.target_R != -100]] = False
    case.hidden_TD[unread_T] = float("nan")
    case.weight_VD[900:] = float("nan")
    for before, after in zip(clean, results(case, backend, **options), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plan", PLANS)
def test_bits_do_not_depend_on_run_grid_or_company(
    plan: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 runs, half of them while another stream keeps the GPU busy; then other grids."""
    module = importlib.import_module(f"nova_kernels.linear_logprob._{backend}")
    case = gpu_case(1500, 32003, D=512, T=900)
    first = results(case, backend, plan=plan)
    busy, square = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    for run in range(20):
        if run % 2:
            with torch.cuda.stream(busy):
                for _ in range(50):
                    square.matmul(square)
        for one, other in zip(first, results(case, backend, plan=plan), strict=True):
            assert torch.equal(one, other), run
    torch.cuda.synchronize()
    for programs in (1, 7, 60):
        if backend == "triton":
            monkeypatch.setattr(module, "_num_programs", lambda items, _, n=programs: min(items, n))
        else:
            monkeypatch.setattr(module, "_num_clusters", lambda _, n=programs: n)
        for one, other in zip(first, results(case, backend, plan=plan), strict=True):
            assert torch.equal(one, other), programs


@pytest.mark.parametrize("backend", BACKENDS)
def test_plans_and_inference_give_the_same_values(backend: str) -> None:
    case = gpu_case(1000, 32003, D=512)
    recompute, store = (results(case, backend, plan=plan)[0] for plan in PLANS)
    with torch.no_grad():
        tensors = [case.hidden_TD.bfloat16(), case.weight_VD.bfloat16(), *case[2:4]]
        inferred = linear_logprob(*tensors, backend=backend).logp_R
    assert torch.equal(recompute, store)
    assert torch.equal(recompute, inferred)


def peak_extra_bytes(R: int, plan: str, workspace_mib: int, backend: str) -> int:
    """Above inputs and gradients, and above the two (R, D) tensors that every plan has."""
    T, D, V = 4096, 512, 128256
    hidden_TD = torch.randn(T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight_VD = torch.randn(V, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step(num_rows: int) -> None:
        row_R, target_R = (torch.randint(0, n, (num_rows,), device="cuda") for n in (T, V))
        hidden_TD.grad = weight_VD.grad = None
        options = {"plan": plan, "workspace_mib": workspace_mib, "backend": backend}
        linear_logprob(hidden_TD, weight_VD, row_R, target_R, **options).logp_R.sum().backward()
        torch.cuda.synchronize()

    step(8)  # cuBLAS takes its own workspace, once
    hidden_TD.grad = weight_VD.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() + hidden_TD.nbytes + weight_VD.nbytes
    step(R)
    return torch.cuda.max_memory_allocated() - before - R * D * (2 + 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_does_not_depend_on_the_rows(backend: str) -> None:
    """recompute: the workspace and O(R), not R * V; store: R * V in bf16 besides."""
    extra = {R: peak_extra_bytes(R, "recompute", 64, backend) for R in (512, 2048, 8192, 32768)}
    allowance = {R: (64 << 20) + 1024 * R + (4 << 20) for R in extra}
    assert all(extra[R] <= allowance[R] for R in extra), (extra, allowance)
    stored = peak_extra_bytes(2048, "store", 64, backend)
    maxima = (
        2 * 4 * 2048 * (128256 // 256)
    )  # one per row and tile of columns, and a copy while they are merged
    assert 2048 * 128256 * 2 <= stored <= 2048 * 128512 * 2 + allowance[2048] + maxima


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plan", PLANS)
def test_products_of_sizes_beyond_2_31(plan: str, backend: str) -> None:
    """T * D, and R * V in the stored exponentials: 32-bit offsets would wrap."""
    T, D, R, V = 1_100_000, 2048, 40_000, 65_536
    hidden_TD = torch.zeros(T, D, dtype=torch.bfloat16, device="cuda")
    hidden_TD[-R:] = torch.randn(R, D, device="cuda") * 0.05
    weight_VD = torch.randn(V, D, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    row_R = torch.arange(T - R, T, device="cuda")
    target_R = torch.randint(0, V, (R,), device="cuda")
    logp_R = linear_logprob(
        hidden_TD, weight_VD, row_R, target_R, plan=plan, backend=backend
    ).logp_R
    last = slice(R - 100, R)
    plain_RV = torch.log_softmax((hidden_TD[row_R[last]].float() @ weight_VD.float().t()), dim=1)
    wanted_R = plain_RV.gather(1, target_R[last][:, None])[:, 0].detach()
    torch.testing.assert_close(logp_R[last], wanted_R, rtol=1e-4, atol=1e-3)
    upstream_R = torch.zeros(R, device="cuda")
    upstream_R[last] = 1.0
    (dweight_VD,) = torch.autograd.grad(logp_R, weight_VD, upstream_R)
    p_RV = plain_RV.detach().exp()
    dz_RV = -p_RV
    dz_RV[torch.arange(100, device="cuda"), target_R[last]] += 1.0
    wide_VD = dz_RV.double().t() @ hidden_TD[row_R[last]].double()
    plain_VD = dz_RV.bfloat16().t() @ hidden_TD[row_R[last]]
    assert_close_to(wide_VD, dweight_VD, plain_VD, what="dweight")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.skipif("cuda" not in BACKENDS, reason="this process tests others")
def test_2000_launches_give_one_result(plan: str) -> None:
    """Of the CUDA kernels: a lost arrival would hang, a race would differ."""
    case = gpu_case(600, 3000, D=264)
    first = results(case, "cuda", plan=plan)
    for _ in range(1000):
        again = results(case, "cuda", plan=plan)
        assert all(map(torch.equal, first, again))
