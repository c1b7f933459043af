"""kv_shift_rope against a token-by-token definition, and the exactness of sharing in a model."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_kernels import kv_shift_rope, packed_attention
from nova_kernels.backend import triton_runs_on
from nova_kernels.kv_shift_rope import rope_tables
from nova_kernels.segments import positions, previous_token, segment_index
from nova_kernels.testing import (
    assert_close_to,
    max_error,
    poison,
    random_segments,
    seeded_normal,
    segment_table,
)

on_cpu = pytest.mark.skipif(
    not triton_runs_on(torch.device("cpu")), reason="Triton is not installed, or a GPU runs it"
)
FP32_BACKENDS = ["reference", pytest.param("triton", marks=on_cpu)]

documents = st.lists(
    st.tuples(st.integers(0, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)


def by_definition(q, k, v, segments, k_mix, v_mix, *tables, interleaved=False):
    """Token by token, RoPE as a complex product; differentiable, in the input's dtype."""
    cos_PF, sin_PF = tables
    T, F = len(q), cos_PF.shape[1]
    position, previous = positions(segments, T).tolist(), previous_token(segments, T).tolist()

    def shift(x, mix):
        if mix is None:
            return x
        zero = torch.zeros_like(x[0])
        rows = [
            mix[:, 1:] * x[t] + mix[:, :1] * (x[p] if p >= 0 else zero)
            for t, p in enumerate(previous)
        ]
        return torch.stack(rows)

    def rotate(x):
        turn, passed = x[..., : 2 * F], x[..., 2 * F :]
        pairs = turn.unflatten(-1, (F, 2)) if interleaved else turn.unflatten(-1, (2, F)).mT
        factor = torch.complex(cos_PF[position].to(x.dtype), sin_PF[position].to(x.dtype))
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * factor[:, None])
        return torch.cat(((turned if interleaved else turned.mT).flatten(-2), passed), -1)

    return rotate(q), rotate(shift(k, k_mix)), shift(v, v_mix)


def inputs(T, N=4, K=2, H=8, dtype=torch.float64):
    """[q, k, v, k_mix, v_mix] with gradients, and upstream gradients of q, k, v."""
    shapes = ((T, N, H), (T, K, H), (T, K, H), (K, 2), (K, 2))
    args = [seeded_normal(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]
    return args, [seeded_normal(*s, seed=9 + i, dtype=dtype) for i, s in enumerate(shapes[:3])]


def gradients(outputs, args, upstream):
    used = [(o, d) for o, d in zip(outputs, upstream, strict=True) if o.requires_grad]
    return torch.autograd.grad([o for o, _ in used], args, [d for _, d in used], allow_unused=True)


def assert_same(got, expected, tolerance=1e-12):
    for number, (a, b) in enumerate(zip(expected, got, strict=True)):
        assert (a is None) == (b is None), number
        assert a is None or max_error(a, b) < tolerance, number


@pytest.mark.parametrize("backend", FP32_BACKENDS)
@given(documents, st.integers(0, 5), st.booleans(), st.sampled_from([2, 4, 6, 8]))
@settings(deadline=None, max_examples=12)
def test_any_table_in_fp32(backend, docs, padding, interleaved, rotary_dim):
    """Earned tolerances: twice the error of the token-by-token definition in fp32."""
    segments = segment_table(docs, padding)
    T = padding + sum(prefix + sum(responses) for prefix, responses in docs)
    args, upstream = inputs(T, dtype=torch.float32)
    tables = rope_tables(40, rotary_dim)
    option = {"interleaved": interleaved}

    def results(op, args, upstream, **more):
        out = op(*args[:3], segments, *args[3:], *tables, **option, **more)
        return [*out, *gradients(out, args, upstream)]

    with poison():
        got = results(kv_shift_rope, args, upstream, backend=backend)
    wide = [x.detach().double().requires_grad_() for x in args]
    exact = results(by_definition, wide, [d.double() for d in upstream])
    plain = results(by_definition, args, upstream)
    for number, values in enumerate(zip(exact, got, plain, strict=True)):
        assert_close_to(*values, what=str(number))


@given(documents, st.integers(0, 5), st.booleans(), st.sampled_from([2, 4, 8]))
@settings(deadline=None, max_examples=40)
def test_any_table_matches_the_definition(docs, padding, interleaved, rotary_dim):
    segments = segment_table(docs, padding)
    T = padding + sum(prefix + sum(responses) for prefix, responses in docs)
    (q, k, v, k_mix, v_mix), upstream = inputs(T)
    tables = rope_tables(40, rotary_dim)
    with poison():
        got = kv_shift_rope(q, k, v, segments, k_mix, v_mix, *tables, interleaved=interleaved)
        got_grads = gradients(got, (q, k, v, k_mix, v_mix), upstream)
    expected = by_definition(q, k, v, segments, k_mix, v_mix, *tables, interleaved=interleaved)
    assert_same(got, expected)
    assert_same(got_grads, gradients(expected, (q, k, v, k_mix, v_mix), upstream))


@pytest.mark.parametrize("backend", FP32_BACKENDS)
@pytest.mark.parametrize("mixed", ["neither", "k", "v"])
def test_without_mixing_it_is_packed_rope(mixed, backend):
    segments = segment_table([(3, [4, 2])], padding=3)
    dtype = torch.float64 if backend == "reference" else torch.float32
    (q, k, v, k_mix, v_mix), upstream = inputs(12, dtype=dtype)
    mixes = (k_mix if mixed == "k" else None, v_mix if mixed == "v" else None)
    tables = rope_tables(12, 8)
    got = kv_shift_rope(q, k, v, segments, *mixes, *tables, backend=backend)
    expected = by_definition(q, k, v, segments, *mixes, *tables)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_same(got, expected, tolerance)
    args = (q, k, v, k_mix, v_mix)
    ours, theirs = gradients(got, args, upstream), gradients(expected, args, upstream)
    assert_same(ours, theirs, tolerance)
    assert mixed == "v" or got[2] is v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_within_twice_plain_torchs(dtype):
    T = 300
    segments = random_segments(np.random.default_rng(0), T, max_prefix=40, max_response=40)
    tables, args, upstream = rope_tables(T, 32), *inputs(T, H=32, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in args]

    def results(op, args, upstream):
        out = op(*args[:3], segments, *args[3:], *tables)
        return [*out, *gradients(out, args, upstream)]

    exact = results(by_definition, wide, [d.double() for d in upstream])
    plain = results(by_definition, args, upstream) if dtype == torch.float32 else None
    got = results(kv_shift_rope, args, upstream)
    for number, (reference, ours) in enumerate(zip(exact, got, strict=True)):
        assert ours.dtype == dtype
        # Complex half products do not exist on CPUs: there the rounded exact result is the bar.
        bar = plain[number] if plain else reference.to(dtype)
        assert_close_to(reference, ours, bar, what=str(number))


@pytest.mark.parametrize("backend", FP32_BACKENDS)
def test_identity_mix_changes_nothing(backend):
    segments = segment_table([(3, [4, 2])], padding=3)
    (q, k, v, _, _), _ = inputs(12, dtype=torch.float32)
    identity = torch.tensor([[0.0, 1.0]] * 2)
    tables = rope_tables(12, 8)
    plain = kv_shift_rope(q, k, v, segments, None, None, *tables, backend=backend)
    shifted = kv_shift_rope(q, k, v, segments, identity, identity, *tables, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, shifted, strict=True))


def test_a_rejected_answer_does_not_see_the_chosen_one():
    """The first token of a branch mixes with the last prefix token, not with its neighbour."""
    segments = segment_table([(3, [2, 2])], padding=0)
    k = torch.arange(7.0)[:, None, None].expand(7, 1, 2).contiguous()
    mix = torch.tensor([[1.0, 0.0]])
    _, _, v = kv_shift_rope(k, k, k, segments, None, mix, *rope_tables(7, 2))
    assert v[:, 0, 0].tolist() == [0, 0, 1, 2, 3, 2, 5]


def test_five_thousand_segments_and_poisoned_padding():
    T = 11_000
    segments = segment_table([(1, [1, 1, 1])] * 2500, padding=1000)
    assert len(segments) == 7501
    args, upstream = inputs(T)
    q, k, v, k_mix, v_mix = args
    tables = rope_tables(1000, 8)
    previous = previous_token(segments, T)
    clean = kv_shift_rope(q, k, v, segments, k_mix, v_mix, *tables)
    before = torch.where((previous >= 0)[:, None, None], v[previous], 0.0)
    assert max_error(v_mix[:, 1:] * v + v_mix[:, :1] * before, clean[2]) < 1e-12

    dirty = [x.detach().clone() for x in (q, k, v)]
    for x in dirty:
        x[10_000:] = float("nan")
    dirty = [x.requires_grad_() for x in dirty]
    seen = kv_shift_rope(*dirty, segments, k_mix, v_mix, *tables)
    assert all(torch.equal(a[:10_000], b[:10_000]) for a, b in zip(clean, seen, strict=True))
    clean_grads, seen_grads = (
        gradients(o, a, upstream) for o, a in ((clean, args[:3]), (seen, dirty))
    )
    for a, b in zip(clean_grads, seen_grads, strict=True):
        assert torch.equal(a[:10_000], b[:10_000])


def test_successors_are_the_transpose_of_previous():
    segments = segment_table([(5, [3] * 9), (0, [7, 2]), (30, [1, 40])], padding=11)
    T = int(segments[-1, 1])
    index = segment_index(segments, T)
    offset_T1, token_J = index.successors
    for t in range(T):
        behind = token_J[offset_T1[t] : offset_T1[t + 1]].tolist()
        every = (index.previous_T == t).nonzero().flatten().tolist()
        assert behind == [u for u in every if u != t + 1]


def test_bit_identical_runs_and_schedules():
    T = 900
    segments = random_segments(np.random.default_rng(0), T, max_responses=8)
    args, upstream = inputs(T, dtype=torch.float32)
    tables = rope_tables(T, 8)
    runs = []
    for schedule in (None, None, segment_index(segments, T)):
        out = kv_shift_rope(*args[:3], segments, *args[3:], *tables, schedule=schedule)
        runs.append([*out, *gradients(out, args, upstream)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_replicated_heads_sum_to_the_unsharded_gradient():
    """Two ranks that hold the same KV head with half of the query heads each."""
    segments = segment_table([(9, [7, 5, 3])], padding=4)
    (q, k, v, k_mix, v_mix), (dout, _, _) = inputs(28, N=4, K=1, H=8)
    tables = rope_tables(28, 8)

    def mix_gradients(heads):
        out = kv_shift_rope(q[:, heads], k, v, segments, k_mix, v_mix, *tables)
        return torch.autograd.grad(
            packed_attention(*out, segments), (k, v, k_mix, v_mix), dout[:, heads]
        )

    halves = mix_gradients(slice(0, 2)), mix_gradients(slice(2, 4))
    assert_same([a + b for a, b in zip(*halves, strict=True)], mix_gradients(slice(0, 4)))


def test_tables_are_rounded_once():
    cos, sin = rope_tables(100_001, 8, base=500_000.0)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (100_001, 4)
    angle = 100_000 * 500_000.0 ** (-2 / 8)
    assert float(cos[-1, 1]) == np.float32(math.cos(angle))
    assert float(sin[-1, 1]) == np.float32(math.sin(angle))
    with pytest.raises(ValueError, match="rotary_dim is 7"):
        rope_tables(10, 7)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"k_mix_K2": torch.zeros(3, 2)}, r"k_mix_K2 has shape \(3, 2\).*\(2, 2\)"),
        ({"cos_PF": torch.zeros(7, 4)}, "sin_PF has shape"),
        ({"cos_PF": torch.zeros(7, 4), "sin_PF": torch.zeros(7, 4)}, "7 rows.*up to 7"),
        ({"cos_PF": torch.zeros(8, 5), "sin_PF": torch.zeros(8, 5)}, "5 columns.*10 dims"),
        ({"cos_PF": torch.zeros(8, 4).double()}, "cos_PF has dtype float64.*float32"),
        ({"v_TKH": torch.zeros(8, 2, 8).half()}, "v_TKH has dtype float16"),
        ({"backend": "cuda"}, "kv_shift_rope: backend='cuda'"),
    ],
)
def test_mistakes_are_named(change, rule):
    kv, mix = torch.zeros(8, 2, 8), torch.zeros(2, 2)
    cos, sin = rope_tables(8, 8)
    good = {"q_TNH": torch.zeros(8, 4, 8), "k_TKH": kv, "v_TKH": kv, "k_mix_K2": mix}
    good |= {"v_mix_K2": mix, "cos_PF": cos, "sin_PF": sin, "segments_S4": segment_table([], 8)}
    with pytest.raises(ValueError, match=rule):
        kv_shift_rope(**{**good, **change})


# --- sharing: a packed document equals its responses one by one ---

D, N, K, H = 16, 4, 2, 4


def parameters(layers=2):
    """A small transformer's, fp64; mixes far from the identity."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (values / shape[-1] ** 0.5).requires_grad_()

    return {
        "embedding": random(50, D),
        **{f"qkv_{i}": random((N + 2 * K) * H, D) for i in range(layers)},
        **{f"out_{i}": random(D, N * H) for i in range(layers)},
        **{f"k_mix_{i}": random(K, 2) for i in range(layers)},
        **{f"v_mix_{i}": random(K, 2) for i in range(layers)},
    }


def model(weights, tokens, segments, kv_shift, layers=2):
    hidden = weights["embedding"][tokens]
    tables = rope_tables(64, H)
    for i in range(layers):
        x = torch.nn.functional.rms_norm(hidden, (D,))
        q, k, v = (x @ weights[f"qkv_{i}"].T).view(-1, N + 2 * K, H).split((N, K, K), dim=1)
        mixes = (weights[f"k_mix_{i}"], weights[f"v_mix_{i}"]) if kv_shift else (None, None)
        q, k, v = kv_shift_rope(q, k, v, segments, *mixes, *tables)
        hidden = hidden + packed_attention(q, k, v, segments).flatten(1) @ weights[f"out_{i}"].T
    return hidden @ weights["embedding"].T  # logits


@pytest.mark.parametrize("kv_shift", [False, True])
@given(docs=documents)
@settings(deadline=None, max_examples=12)
def test_sharing_is_exact(kv_shift, docs):
    """math.md section 1: logits and all parameter gradients, packed with sharing or one by one."""
    weights = parameters()
    used = {name: w for name, w in weights.items() if kv_shift or "mix" not in name}
    generator = torch.Generator().manual_seed(1)
    pack, alone = [], []
    for prefix, responses in docs:
        prefix_tokens = torch.randint(0, 50, (prefix,), generator=generator)
        pack.append(prefix_tokens)
        for response in responses:
            pack.append(torch.randint(0, 50, (response,), generator=generator))
            alone.append(torch.cat((prefix_tokens, pack[-1])))
    tokens = torch.cat(pack)
    packed_logits = model(weights, tokens, segment_table(docs, 0), kv_shift)

    # Rows that predict a response: its own, and the last row of the prefix, shared by all.
    packed_rows, alone_logits, at = [], [], 0
    for prefix, responses in docs:
        last_prefix = [at + prefix - 1] if prefix else []
        at += prefix
        for response in responses:
            packed_rows += [*last_prefix, *range(at, at + response)]
            at += response
            sequence = alone[len(alone_logits)]
            logits = model(weights, sequence, segment_table([], len(sequence)), kv_shift)
            alone_logits.append(logits[-response - len(last_prefix) :])
    shared, separate = packed_logits[packed_rows], torch.cat(alone_logits)
    assert max_error(separate, shared) < 1e-10

    upstream = torch.randn(shared.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad(separate, list(used.values()), upstream)
    got = torch.autograd.grad(shared, list(used.values()), upstream)
    for name, a, b in zip(used, expected, got, strict=True):
        assert max_error(a, b) < 1e-10 * max(1.0, float(a.abs().amax())), name
