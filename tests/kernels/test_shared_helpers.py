"""What every op and every test leans on: backend choice, argument checks, tolerances, ranks."""

import logging
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from nova_kernels.backend import resolve
from nova_kernels.checks import check_dtype, check_same_device, check_shape
from nova_kernels.testing import assert_close_to, max_error, poison, run_ranks, seeded_normal


def test_auto_takes_the_first_and_says_so_once(caplog):
    with caplog.at_level(logging.INFO, logger="nova_kernels.backend"):
        assert resolve("an_op", "auto", ("triton", "reference")) == "triton"
        assert resolve("an_op", "auto", ("triton", "reference")) == "triton"
        assert resolve("an_op", "reference", ("triton", "reference")) == "reference"
    assert [r.getMessage() for r in caplog.records] == ["an_op -> triton", "an_op -> reference"]


def test_an_explicit_backend_is_never_replaced():
    with pytest.raises(ValueError, match=r"an_op: backend='cuda'.*triton, reference.*auto"):
        resolve("an_op", "cuda", ("triton", "reference"))
    with pytest.raises(ValueError, match="none"):
        resolve("an_op", "auto", ())


def test_checks_pass_what_fits_and_name_what_does_not():
    x = torch.zeros(3, 4)
    check_shape("x_TD", x, ("T", 4))
    check_shape("x_TD", x, (None, 4))
    for expected in (("T", 5), (3,), (3, 4, 1)):
        with pytest.raises(ValueError, match=r"x_TD has shape \(3, 4\)"):
            check_shape("x_TD", x, expected)
    check_dtype("x_TD", x, (torch.float32, torch.bfloat16))
    with pytest.raises(ValueError, match=r"float32, but must be int64.*x_TD.to\(torch.int64\)"):
        check_dtype("x_TD", x, (torch.int64,))
    check_same_device(a=x, b=None)
    with pytest.raises(ValueError, match="a on cpu, b on meta"):
        check_same_device(a=x, b=torch.zeros(1, device="meta"))


def test_a_tolerance_is_earned():
    exact = seeded_normal(1000, seed=0, dtype=torch.float64)
    rounded = exact.to(torch.bfloat16)
    assert_close_to(exact, rounded, rounded)
    with pytest.raises(AssertionError, match="the sum: max error"):
        assert_close_to(exact, rounded + 0.2, rounded, what="the sum")
    with pytest.raises(AssertionError):
        assert_close_to(exact, torch.full_like(rounded, float("nan")), rounded)
    infinite = torch.tensor([float("inf"), 1.0])
    assert max_error(infinite, infinite) == 0.0
    assert max_error(torch.zeros(0), torch.zeros(0)) == 0.0


def test_poison_fills_scratch_and_then_stops():
    like = torch.zeros(4)
    with poison():
        for scratch in (torch.empty(4), torch.empty_like(like), like.new_empty(4)):
            assert scratch.isnan().all()
        assert torch.empty(4, dtype=torch.int64).shape == (4,)
    assert torch.empty.__name__ == "empty" and not hasattr(torch.empty, "__wrapped__")


def add_ranks(rank, tensor):
    total = tensor + rank
    dist.all_reduce(total)  # now the sum over all ranks
    return {"total": total, "rank": rank, "threads": torch.get_num_threads()}


def fail_on_rank_one(rank):
    if rank == 1:
        raise ValueError("rank one fell over")
    dist.barrier()


def test_run_ranks_returns_results_and_passes_errors_on():
    results = run_ranks(add_ranks, 2, torch.ones(3))
    assert [r["rank"] for r in results] == [0, 1] and results[0]["threads"] == 1
    assert all(torch.equal(r["total"], torch.full((3,), 3.0)) for r in results)
    with pytest.raises(Exception, match="rank one fell over"):
        run_ranks(fail_on_rank_one, 2)


def test_import_gives_functions_and_needs_no_compiled_extension():
    code = (
        "import sys; sys.modules['nova_kernels._C'] = None\n"
        "import nova_kernels.packed_attention.reference\n"
        "import nova_kernels as n\n"
        "assert all(callable(getattr(n, name)) for name in n.__all__), n.__all__\n"
        "print(*n.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        "kv_shift_rope", "linear_dpo_loss", "linear_logprob", "packed_attention", "preference_loss",
    ]  # fmt: skip
