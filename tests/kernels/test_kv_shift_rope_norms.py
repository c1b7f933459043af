"""kv_shift_rope's norms of q and k: against the token-by-token definition, on every kind of pack."""

import importlib.util
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_kernels import kv_shift_rope, packed_attention
from nova_kernels.kv_shift_rope import rope_tables
from nova_kernels.segments import segment_index
from nova_kernels.testing import (
    assert_close_to,
    max_error,
    poison,
    random_segments,
    seeded_normal,
    segment_table,
)

spec = importlib.util.spec_from_file_location(
    "kv_shift_cases", Path(__file__).with_name("kv_shift_cases.py")
)
assert spec is not None and spec.loader is not None
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)
BACKENDS, EPS, NAMES, on_cpu = cases.BACKENDS, cases.EPS, cases.NAMES, cases.on_cpu
by_definition, call, inputs = cases.by_definition, cases.call, cases.inputs
gradients, results, wide = cases.gradients, cases.results, cases.wide
documents = st.lists(
    st.tuples(st.integers(0, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)


@given(documents, st.integers(0, 5), st.booleans(), st.sampled_from([2, 4, 8]))
@settings(deadline=None, max_examples=25)
def test_any_table_matches_the_definition(docs, padding, interleaved, rotary_dim):
    segments = segment_table(docs, padding)
    args, upstream = inputs(int(segments[-1, 1]))
    rest = (segments, rope_tables(40, rotary_dim), interleaved)
    with poison():
        got = results(call, args, upstream, *rest[:2], interleaved=interleaved)
    expected = results(by_definition, args, upstream, *rest)
    for number, values in enumerate(zip(expected, got, strict=True)):
        assert max_error(*values) < 1e-11, number


@pytest.mark.parametrize("backend", BACKENDS)
@given(documents, st.integers(0, 5), st.booleans(), st.sampled_from([2, 6, 8]))
@settings(deadline=None, max_examples=5)
def test_any_table_in_fp32(backend, docs, padding, interleaved, rotary_dim):
    """Earned tolerances: twice the error of the definition in fp32."""
    segments = segment_table(docs, padding)
    args, upstream = inputs(int(segments[-1, 1]), dtype=torch.float32)
    rest = (segments, rope_tables(40, rotary_dim), interleaved)
    with poison():
        got = results(call, args, upstream, *rest[:2], interleaved=interleaved, backend=backend)
    exact = results(by_definition, wide(args), [d.double() for d in upstream], *rest)
    plain = results(by_definition, args, upstream, *rest)
    for number, values in enumerate(zip(exact, got, plain, strict=True)):
        assert_close_to(*values, what=str(number))


OPTIONAL = [set(c) for n in range(5) for c in itertools.combinations(NAMES[3:], n)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absent", OPTIONAL, ids=lambda absent: "-".join(sorted(absent)) or "none")
def test_every_part_may_be_left_out(absent, backend):
    segments = segment_table([(3, [4, 2])], padding=3)
    dtype = torch.float64 if backend == "reference" else torch.float32
    args, upstream = inputs(12, dtype=dtype, absent=absent)
    tables = rope_tables(12, 6)
    got = results(call, args, upstream, segments, tables, backend=backend)
    expected = results(by_definition, args, upstream, segments, tables)
    for number, values in enumerate(zip(expected, got, strict=True)):
        assert max_error(*values) < (1e-12 if dtype == torch.float64 else 2e-5), number


@pytest.mark.parametrize("shape", [(4, 2, 32, 16), (16, 1, 12, 4)])
@pytest.mark.parametrize("interleaved", [False, True])
@on_cpu
def test_triton_on_every_kind_of_head(shape, interleaved):
    """Head dims that are no power of two, partial rotation, several groups of heads and blocks of tokens,
    strided inputs, many branches behind one token; scratch poisoned; the same bits from run to run."""
    N, K, H, F = shape
    segments = segment_table([(5, [3] * 9), (0, [7, 2]), (30, [1, 40])], padding=11)
    args, upstream = inputs(int(segments[-1, 1]), N, K, H + 2, dtype=torch.float32)
    for name in ("q", "k", "v"):
        args[name] = args[name].detach()[:, :, :H].requires_grad_()
    for name in ("q_norm", "k_norm"):
        args[name] = args[name].detach()[:H].requires_grad_()
    upstream = [d[:, :, :H] for d in upstream]
    rest, option = (segments, rope_tables(80, 2 * F)), {"interleaved": interleaved}
    with poison():
        got, again = (
            results(call, args, upstream, *rest, **option, backend="triton") for _ in range(2)
        )
    exact = results(call, wide(args), [d.double() for d in upstream], *rest, **option)
    plain = results(call, args, upstream, *rest, **option, backend="reference")
    for number, values in enumerate(zip(exact, got, plain, strict=True)):
        assert_close_to(*values, what=str(number))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(32, 8, 128, 64), (16, 4, 64, 16)])
def test_triton_on_a_gpu(shape, dtype):
    """Training shapes with norms: values, every gradient, run-to-run bit equality, and q in place."""
    N, K, H, F = shape
    T = 8191
    segments = random_segments(np.random.default_rng(0), T, max_prefix=300, max_response=200)
    args, upstream = inputs(T, N, K, H, dtype)
    args = {name: x.detach().cuda().requires_grad_() for name, x in args.items()}
    upstream = [d.cuda() for d in upstream]
    rest = (segments, [table.cuda() for table in rope_tables(1000, 2 * F)])
    index = segment_index(segments, T).to("cuda")
    with poison():
        got, again = (
            results(call, args, upstream, *rest, schedule=index, backend="triton") for _ in range(2)
        )
    exact = results(call, wide(args), [d.double() for d in upstream], *rest, schedule=index)
    plain = results(call, args, upstream, *rest, schedule=index, backend="reference")
    for number, values in enumerate(zip(exact, got, plain, strict=True)):
        assert_close_to(*values, what=str(number))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    with torch.no_grad():
        q = args["q"].clone()
        written = call({**args, "q": q}, *rest, schedule=index, backend="triton", inplace_q=True)
    assert written[0] is q
    assert all(torch.equal(a, b) for a, b in zip(written, got[:3], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ["one segment", "many segments"])
def test_poisoned_padding_and_many_segments(shape, backend):
    """NaN in the padding reaches no other token, forward or backward: its rows are those of the reference with clean padding.
    (The weights' gradients run over all rows, as documented.)"""
    many = 2500 if backend == "reference" else 400  # the interpreter is slow
    docs = [(1, [1, 1])] * many if shape != "one segment" else [(40, [60])]
    num_tokens = sum(prefix + sum(responses) for prefix, responses in docs)
    segments = segment_table(docs, padding=20)
    assert len(segments) in (2, 2 * many + 1)
    args, upstream = inputs(num_tokens + 20, N=2, K=1, H=4, dtype=torch.float32)
    tables = rope_tables(100, 4)
    dirty = dict(args)
    for name in ("q", "k", "v"):
        dirty[name] = args[name].detach().clone()
        dirty[name][num_tokens:] = float("nan")
        dirty[name].requires_grad_()
    with poison():
        clean = results(call, args, upstream, segments, tables, backend="reference")
        seen = results(call, dirty, upstream, segments, tables, backend=backend)
    for a, b in zip(clean[:6], seen[:6], strict=True):  # q, k, v and their gradients
        assert max_error(a[:num_tokens], b[:num_tokens]) < (2e-5 if backend == "triton" else 1e-30)


@given(docs=documents)
@settings(deadline=None, max_examples=15)
def test_packing_and_sharing_change_nothing(docs):
    """Through attention: a response's outputs and every gradient, packed behind a shared prefix or alone."""
    segments = segment_table(docs, 0)
    args, _ = inputs(int(segments[-1, 1]))
    tables = rope_tables(40, 8)
    packed = packed_attention(*call(args, segments, tables), segments)
    rows, alone, at = [], [], 0
    for prefix, responses in docs:
        first, at = at, at + prefix
        for response in responses:
            own = [*range(first, first + prefix), *range(at, at + response)]
            single = segment_table([], len(own))
            part = {name: x[own] if x.dim() == 3 else x for name, x in args.items()}
            alone.append(packed_attention(*call(part, single, tables), single)[prefix:])
            rows += range(at, at + response)
            at += response
    shared, separate = packed[rows], torch.cat(alone)
    assert max_error(separate, shared) < 1e-11
    upstream = seeded_normal(*shared.shape, seed=3, dtype=torch.float64)
    for expected, got in zip(
        gradients([separate], args, [upstream]), gradients([shared], args, [upstream]), strict=True
    ):
        assert max_error(expected, got) < 1e-10


def test_replicated_heads_sum_to_the_unsharded_gradient():
    """Two ranks that hold the same KV head with half of the query heads each: the weights' gradients are parts of a sum."""
    segments = segment_table([(9, [7, 5, 3])], padding=4)
    args, (dout, _, _) = inputs(28, N=4, K=1)
    tables = rope_tables(28, 8)

    def weight_gradients(heads):
        part = {**args, "q": args["q"][:, heads]}
        out = packed_attention(*call(part, segments, tables), segments)
        return torch.autograd.grad(out, [args[name] for name in NAMES[1:]], dout[:, heads])

    whole = weight_gradients(slice(0, 4))
    for a, b, c in zip(
        weight_gradients(slice(0, 2)), weight_gradients(slice(2, 4)), whole, strict=True
    ):
        assert max_error(c, a + b) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_comes_before_the_mix_and_takes_zeros(backend):
    """A mix of (1, 1) doubles a key that equals its predecessor: after a norm it could not. A row of zeros stays finite."""
    segments = segment_table([], 3)
    ones = torch.ones(3, 1, 4)
    mix = torch.ones(1, 2)
    flat = (torch.ones(3, 2), torch.zeros(3, 2))
    args = {"q": ones, "k": ones, "v": ones, "k_mix": mix, "k_norm": torch.ones(4)}
    _, k, _ = call(args, segments, flat, backend=backend)
    unit = 1 / math.sqrt(1 + EPS)
    assert k[:, 0, 0].tolist() == pytest.approx([unit, 2 * unit, 2 * unit])
    zeros = {name: torch.zeros(3, 1, 4).requires_grad_() for name in ("q", "k", "v")}
    zeros |= {"q_norm": torch.ones(4), "k_norm": torch.ones(4), "k_mix": mix, "v_mix": mix}
    got = results(call, zeros, [ones] * 3, segments, flat, backend=backend)
    assert all(x.isfinite().all() for x in got)
    assert float(got[3].abs().min()) == pytest.approx(1 / math.sqrt(EPS), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"q_norm_H": torch.ones(7)}, r"q_norm_H has shape \(7,\).*\(8\)"),
        ({"k_norm_H": torch.ones(8, dtype=torch.int32)}, "k_norm_H has dtype int32"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0.*positive"),
        ({"norm_eps": math.nan}, "norm_eps is nan.*positive"),
    ],
)
def test_mistakes_are_named(change, rule):
    q, k = torch.zeros(8, 4, 8), torch.zeros(8, 2, 8)
    with pytest.raises(ValueError, match=rule):
        kv_shift_rope(q, k, k, segment_table([], 8), None, None, *rope_tables(8, 8), **change)


def test_a_schedule_changes_nothing():
    segments = segment_table([(5, [3] * 3), (0, [7, 2])], padding=4)
    T = int(segments[-1, 1])
    args, upstream = inputs(T, dtype=torch.float32)
    tables = rope_tables(T, 8)
    runs = [
        results(call, args, upstream, segments, tables, schedule=schedule)
        for schedule in (None, None, segment_index(segments, T))
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
