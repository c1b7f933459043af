"""kv_shift_rope with q in place: the same bits, what autograd may rely on, and what is refused."""

import importlib.util
from pathlib import Path

import pytest
import torch

from nova_kernels.kv_shift_rope import rope_tables
from nova_kernels.testing import max_error, segment_table

spec = importlib.util.spec_from_file_location(
    "kv_shift_cases", Path(__file__).with_name("kv_shift_cases.py")
)
assert spec is not None and spec.loader is not None
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)
BACKENDS, call, inputs = cases.BACKENDS, cases.call, cases.inputs
gradients, results = cases.gradients, cases.results


def produced(x):
    """As a projection makes it: no leaf, no view, saved by nobody."""
    return x * 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absent", [{"q_norm"}, {"q_norm", "k_norm", "k_mix", "v_mix"}])
def test_in_place_is_the_fresh_result(absent, backend):
    segments = segment_table([(3, [4, 2])], padding=3)
    dtype = torch.float64 if backend == "reference" else torch.float32
    args, upstream = inputs(12, dtype=dtype, absent=absent)
    tables = rope_tables(12, 6)
    fresh = results(call, args, upstream, segments, tables, backend=backend)
    made = {**args, "q": produced(args["q"])}
    q, version = made["q"], made["q"]._version
    out = call(made, segments, tables, backend=backend, inplace_q=True)
    assert out[0] is q and q._version > version
    got = [*out, *gradients(out, args, upstream)]
    assert all(torch.equal(a, b) for a, b in zip(fresh, got, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_autograd_may_rely_on_in_place(backend):
    segments, tables = segment_table([], 6), rope_tables(6, 8)
    args, upstream = inputs(6, dtype=torch.float32, absent={"q_norm"})
    made = {**args, "q": args["q"].exp()}  # whose backward needs its output
    out = call(made, segments, tables, backend=backend, inplace_q=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, args["q"], upstream)
    # What uses the tensor afterwards follows the rotated value.
    made = {**args, "q": produced(args["q"])}
    call(made, segments, tables, backend=backend, inplace_q=True)
    (after,) = torch.autograd.grad(made["q"].square().sum(), args["q"])
    q_out, _, _ = call(args, segments, tables, backend=backend)
    (expected,) = torch.autograd.grad(q_out.square().sum(), args["q"])
    assert max_error(expected, after) < 1e-5
    # A q without gradient stays without one, though k's and the weights' outputs have one.
    plain = {**args, "q": args["q"].detach().clone()}
    out = call(plain, segments, tables, backend=backend, inplace_q=True)
    assert [x.requires_grad for x in out] == [False, True, True]
    del plain["q"]
    gradients(out[1:], plain, upstream[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_without_a_gradient(backend):
    """Slices of one fused projection, by head and interleaved, with the norm: k and v stay as they are."""
    T, K, H = 40, 2, 8
    segments, tables = segment_table([(10, [9, 15])], 6), rope_tables(40, 6)
    args, _ = inputs(T, N=2, K=K, H=H, dtype=torch.float32)
    whole = torch.cat([args[name].detach() for name in ("q", "k", "v")], dim=1)
    by_head = torch.stack([args[name].detach() for name in ("q", "k", "v")], dim=2).flatten(1, 2)
    with torch.no_grad():
        expected = call(args, segments, tables, backend=backend)
        for fused, cut in ((whole, [slice(i, i + 2) for i in (0, 2, 4)]),
                           (by_head, [slice(i, None, 3) for i in range(3)])):  # fmt: skip
            before = fused.clone()
            views = dict(zip(("q", "k", "v"), (fused[:, c] for c in cut), strict=True))
            got = call({**args, **views}, segments, tables, backend=backend, inplace_q=True)
            assert got[0].data_ptr() == fused.data_ptr()
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
            assert all(torch.equal(before[:, c], fused[:, c]) for c in cut[1:])


def refused(name):
    """Arguments that cannot be right in place, by what is wrong."""
    args, _ = inputs(6, K=4, dtype=torch.float32, absent={"q_norm"})
    q = args["q"]
    joint = torch.randn(12, 4, 8)
    wrong = {
        "a leaf": {"q": q},
        "a view": {"q": produced(q).view(6, 4, 8)},
        "a slice": {"q": produced(torch.cat([q, q], 1))[:, :4]},
        "a norm": {"q": produced(q), "q_norm": torch.ones(8)},
        "a norm that learns": {"q": q.detach().clone(), "q_norm": torch.ones(8).requires_grad_()},
        "expanded heads": {"q": torch.randn(6, 1, 8).expand(6, 4, 8)},
        "dims apart": {"q": torch.randn(6, 8, 4).transpose(1, 2)},
        "k itself": {"q": joint[:6], "k": joint[:6]},
        "v overlapping": {"q": joint[:6], "v": joint[3:9]},
        "k transposed": {"q": joint[:6], "k": joint[:6].flatten().view(4, 6, 8).transpose(0, 1)},
    }
    return {**args, **wrong[name]}


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("a leaf", "is a leaf that requires a gradient"),
        ("a view", "is a view of a tensor that requires"),
        ("a slice", "is a view of a tensor that requires"),
        ("a norm", "q_norm_H the gradient takes q as it was"),
        ("a norm that learns", "q_norm_H the gradient takes q as it was"),
        ("expanded heads", r"strides \(8, 0, 1\)"),
        ("dims apart", r"strides \(32, 1, 4\)"),
        ("k itself", "q_TNH and k_TKH may share memory"),
        ("v overlapping", "q_TNH and v_TKH may share memory"),
        ("k transposed", "q_TNH and k_TKH may share memory"),
    ],
)
def test_in_place_refuses_what_cannot_be_right(name, rule):
    args, segments, tables = refused(name), segment_table([], 6), rope_tables(6, 8)
    before = args["q"].detach().clone()
    with pytest.raises(ValueError, match=f"inplace_q: .*{rule}"):
        call(args, segments, tables, inplace_q=True)
    assert torch.equal(args["q"], before)
    call(args, segments, tables)  # fresh outputs are fine
