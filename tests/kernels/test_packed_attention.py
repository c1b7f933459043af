"""packed_attention: the blocked CPU path against the dense definition in fp64, and sharing."""

import functools
import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from nova_kernels import _C, packed_attention
from nova_kernels.backend import triton_runs_on
from nova_kernels.packed_attention import reference
from nova_kernels.packed_attention.reference import attention_mask, dense_attention
from nova_kernels.segments import segment_ids, segment_index
from nova_kernels.testing import (
    assert_close_to,
    max_error,
    poison,
    random_segments,
    seeded_normal,
    segment_table,
)

NAMES = ("out", "dq", "dk", "dv")
documents = st.lists(
    st.tuples(st.integers(0, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4)), max_size=4
)


def inputs(T, N, K, H, dtype=torch.float64):
    """q, k, v with gradients, and an upstream gradient."""
    shapes = ((T, N, H), (T, K, H), (T, K, H), (T, N, H))
    q, k, v, dout = (seeded_normal(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def run(attention, q, k, v, dout):
    """[out, dq, dk, dv]."""
    out = attention(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def dense(segments, **options):
    return lambda q, k, v: dense_attention(q, k, v, segments, **options)[0]


def packed(segments, **options):
    return functools.partial(packed_attention, segments_S4=segments, **options)


def assert_equal_to_rounding(got, expected):
    for name, a, b in zip(NAMES, expected, got, strict=True):
        assert max_error(a, b) < 1e-13 * max(1.0, float(a.abs().amax())), name


@given(docs=documents, padding=st.integers(0, 9), block_rows=st.sampled_from([2, 5, 64]))
@settings(deadline=None, max_examples=40)
def test_any_table_matches_the_dense_mask(docs, padding, block_rows):
    segments = segment_table(docs, padding)
    T = padding + sum(prefix + sum(responses) for prefix, responses in docs)
    args = inputs(T, N=4, K=2, H=8)
    if T == 0:
        assert packed_attention(*args[:3], segments).shape == (0, 4, 8)
        return
    with pytest.MonkeyPatch.context() as patch, poison():
        patch.setattr(reference, "BLOCK_ROWS", block_rows)
        got = run(packed(segments), *args)
    assert_equal_to_rounding(got, run(dense(segments), *args))


@pytest.mark.parametrize("H", [32, 64, 128])
@pytest.mark.parametrize("ratio", range(1, 9))
def test_head_dims_and_grouped_queries(H, ratio):
    segments = segment_table([(70, [5, 90, 1]), (0, [30, 30])], padding=13)
    args = inputs(239, N=2 * ratio, K=2, H=H)
    assert_equal_to_rounding(run(packed(segments), *args), run(dense(segments), *args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_within_twice_plain_torchs(dtype):
    segments = segment_table([(70, [50, 90, 1]), (0, [30])], padding=13)
    args = inputs(254, N=4, K=2, H=32, dtype=dtype)
    exact = run(dense(segments), *[x.detach().double().requires_grad_() for x in args[:3]],
                args[3].double())  # fmt: skip
    got, plain = run(packed(segments), *args), run(dense(segments), *args)
    for name, wide, ours, same in zip(NAMES, exact, got, plain, strict=True):
        assert ours.dtype == dtype
        assert_close_to(wide, ours, same, what=name)


@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
def test_one_segment_is_causal_sdpa(T):
    q, k, v, _ = inputs(T, N=4, K=4, H=32)
    heads_first = [x.transpose(0, 1) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
    got = packed_attention(q, k, v, segment_table([], T))
    assert max_error(expected.transpose(0, 1), got) < 1e-13


def test_a_pack_of_131072_tokens():
    """Thousands of documents, each against SDPA by itself, values and gradients; the work is in the segments, not in T x T."""
    count, length, T = 2048, 64, 131_072
    q, k, v, dout = inputs(T, N=2, K=1, H=16, dtype=torch.float32)
    got = run(packed(segment_table([(0, [length])] * count, 0)), q, k, v, dout)
    batch = [x.detach().unflatten(0, (count, length)).transpose(1, 2).requires_grad_() for x in (q, k, v)]  # fmt: skip
    out = torch.nn.functional.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)
    upstream = dout.unflatten(0, (count, length)).transpose(1, 2)
    expected = [out, *torch.autograd.grad(out, batch, upstream)]
    for ours, theirs in zip(got, expected, strict=True):
        assert max_error(theirs.transpose(1, 2).flatten(0, 1), ours) < 2e-5


def test_equals_flex_attention_on_the_same_mask():
    T = 150
    segments = random_segments(np.random.default_rng(1), T, max_prefix=40, max_response=20)
    segment_T = segment_ids(segments, T)
    prefix_start_T, prefix_end_T = segments[segment_T, 2], segments[segment_T, 3]

    def allowed(_b, _h, q_i, k_i):
        own = (segment_T[q_i] == segment_T[k_i]) & (k_i <= q_i)
        return own | ((k_i >= prefix_start_T[q_i]) & (k_i < prefix_end_T[q_i]))

    q, k, v = (x.detach() for x in inputs(T, N=4, K=2, H=32)[:3])
    mask = create_block_mask(allowed, None, None, T, T, device="cpu")
    batch = [x.transpose(0, 1)[None] for x in (q, k, v)]
    expected = flex_attention(*batch, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    assert max_error(expected, packed_attention(q, k, v, segments)) < 1e-13


def test_log_sum_exp_and_scale():
    segments = segment_table([(70, [5, 30])], padding=3)
    q, k, v, _ = inputs(108, N=4, K=2, H=16)
    out, lse = packed_attention(q, k, v, segments, return_lse=True, softmax_scale=0.7)
    expected, expected_lse = dense_attention(q, k, v, segments, softmax_scale=0.7)
    assert max_error(expected, out) < 1e-13 and max_error(expected_lse, lse) < 1e-13
    assert not lse.requires_grad
    half = packed_attention(q.half(), k.half(), v.half(), segments, return_lse=True)
    assert half[0].dtype == torch.float16 and half[1].dtype == torch.float32


def test_pieces_merge_by_their_log_sum_exp():
    """What return_lse is for: attention to a prefix and to oneself, put together."""
    q, k, v, _ = inputs(40, N=2, K=2, H=16)
    whole, _ = packed_attention(q, k, v, segment_table([], 40), return_lse=True)
    near = segment_table([(0, [25]), (0, [15])], padding=0)
    out, lse = packed_attention(q, k, v, near, return_lse=True)
    score = torch.einsum("qnh,jnh->qnj", q[25:], k[:25]) / 4
    far, far_lse = torch.einsum("qnj,jnh->qnh", score.softmax(-1), v[:25]), score.logsumexp(-1)
    weight = torch.sigmoid(lse[25:] - far_lse)[..., None]
    assert max_error(whole[25:], out[25:] * weight + far * (1 - weight)) < 1e-13


def test_poisoned_padding_reaches_nobody():
    segments = segment_table([(20, [30, 10])], padding=9)
    args = inputs(69, N=4, K=2, H=16)
    dirty = [x.detach().clone() for x in args]
    for x in dirty[:3]:
        x[60:] = float("nan")
    dirty = [x.requires_grad_() for x in dirty[:3]] + dirty[3:]
    for clean, seen in zip(
        run(packed(segments), *args), run(packed(segments), *dirty), strict=True
    ):
        assert torch.equal(clean[:60], seen[:60])


def test_a_pack_of_padding_is_finite():
    args = inputs(100, N=4, K=2, H=16, dtype=torch.float32)
    assert all(x.isfinite().all() for x in run(packed(segment_table([], 100)), *args))


def test_bit_identical_runs_whatever_is_kept_or_recomputed(monkeypatch):
    segments = random_segments(np.random.default_rng(0), 700, max_prefix=150, max_response=90)
    args = inputs(700, N=4, K=2, H=32, dtype=torch.float32)
    first = run(packed(segments), *args)

    def checkpointed(q, k, v):
        return checkpoint(packed(segments), q, k, v, use_reentrant=False)

    variants = [run(packed(segments), *args), run(checkpointed, *args)]
    variants += [run(packed(segments, schedule=segment_index(segments, 700)), *args)]
    for kept in (0, 300_000):
        monkeypatch.setattr(reference, "KEEP_BYTES", kept)
        variants += [run(packed(segments), *args)]
    for variant in variants:
        assert all(torch.equal(a, b) for a, b in zip(first, variant, strict=True))


def test_memory_saved_for_backward_is_linear(monkeypatch):
    monkeypatch.setattr(reference, "KEEP_BYTES", 100_000)
    saved = 0

    def count(x):
        nonlocal saved
        saved += x.nbytes
        return x

    q, k, v, _ = inputs(2000, N=2, K=1, H=8, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        packed_attention(q, k, v, segment_table([], 2000))
    assert saved <= 100_000 + q.nbytes + k.nbytes + v.nbytes  # one T x T fp32 matrix: 16 MB


def test_inputs_may_be_slices_of_a_fused_projection():
    segments = segment_table([(20, [30, 10])], padding=5)
    q, k, v, dout = inputs(65, N=4, K=2, H=16)
    fused = torch.cat((q, k, v), dim=1).detach()
    sliced = [x.requires_grad_() for x in fused.split((4, 2, 2), dim=1)]
    wide_dout = torch.zeros(65, 4, 32, dtype=torch.float64)[..., ::2].copy_(dout)
    assert_equal_to_rounding(
        run(packed(segments), *sliced, wide_dout), run(packed(segments), q, k, v, dout)
    )


@pytest.fixture
def small_triton_tiles(monkeypatch):
    """Tiles of a few tokens, so that a small pack has all kinds of them."""
    if not triton_runs_on(torch.device("cpu")):
        pytest.skip("Triton is not installed, or a GPU runs it")
    triton_path = importlib.import_module("nova_kernels.packed_attention._triton")
    tile = functools.partial(triton_path.Tile, warps=4, stages=2)
    small = triton_path.Tiles(fwd=tile(32, 16), dq=tile(32, 16), dkv=tile(16, 32))
    unpacked = triton_path.Tiles(
        fwd=tile(16, 16, pack=False), dq=tile(16, 32, pack=False), dkv=tile(16, 16, pack=False)
    )
    monkeypatch.setattr(triton_path, "TILES", {64: small, 128: small, 256: unpacked})


TRITON_SHAPES = [(4, 4, 64), (8, 2, 64), (6, 2, 32), (4, 1, 96), (2, 1, 192)]


@pytest.mark.parametrize("shape", TRITON_SHAPES)
def test_triton_matches_the_dense_mask(small_triton_tiles, shape):
    """Whole, diagonal and overhanging tiles, in trunks and behind prefixes; scratch and padding poisoned."""
    N, K, H = shape
    segments = segment_table([(37, [3, 40, 1]), (0, [5, 1]), (16, [20, 17])], padding=9)
    args = inputs(int(segments[-1, 1]), N, K, H, torch.float32)
    dirty = [x.detach().clone() for x in args]
    for x in dirty[:3]:
        x[-9:] = float("nan")
    dirty = [x.requires_grad_() for x in dirty[:3]] + dirty[3:]
    exact = run(dense(segments), *[x.detach().double().requires_grad_() for x in args[:3]],
                args[3].double())  # fmt: skip
    with poison():
        got = run(packed(segments, backend="triton"), *dirty)
    plain = run(dense(segments), *args)
    for name, wide, ours, same in zip(NAMES, exact, got, plain, strict=True):
        assert_close_to(wide[:-9], ours[:-9], same[:-9], what=name)


def test_triton_is_bit_identical_and_returns_the_log_sum_exp(small_triton_tiles):
    segments = segment_table([(20, [9, 30])], padding=0)
    args = inputs(59, 4, 2, 64, torch.float16)
    first, again = (run(packed(segments, backend="triton"), *args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    options = {"return_lse": True, "softmax_scale": 0.3}
    _, lse = packed_attention(*args[:3], segments, backend="triton", **options)
    _, expected = packed_attention(*[x.double() for x in args[:3]], segments, **options)
    assert max_error(expected, lse) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(32, 8, 128), (48, 48, 128), (12, 4, 128), (16, 4, 64), (8, 8, 96), (8, 2, 192), (8, 1, 256)],
)
def test_triton_on_a_gpu(shape, dtype):
    """Training shapes: short documents with branches, and one segment that fills the pack."""
    for segments in (
        random_segments(np.random.default_rng(0), 4095, max_prefix=300, max_response=200),
        segment_table([(1500, [100] * 12)], padding=1395),
        segment_table([], 4095),
    ):
        args = [x.detach().cuda() for x in inputs(4095, *shape, dtype)]
        args = [x.requires_grad_() for x in args[:3]] + args[3:]
        options = {"schedule": segment_index(segments, 4095).to("cuda")}
        with poison():
            got, again = (run(packed(segments, backend="triton", **options), *args) for _ in "12")
        wide = [x.detach().double().requires_grad_() for x in args[:3]] + [args[3].double()]
        exact = run(packed(segments, backend="reference", **options), *wide)
        plain = run(packed(segments, backend="reference", **options), *args)
        for name, *values in zip(NAMES, exact, got, plain, strict=True):
            # P and dS are rounded to the input's dtype for their products, as in every flash kernel.
            slack = 4 * torch.finfo(dtype).eps * float(values[0].abs().max())
            assert_close_to(*values, slack=slack, what=name)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@given(docs=documents, padding=st.integers(0, 9), rows=st.sampled_from([1, 2, 4, 64]))
@settings(deadline=None, max_examples=60)
def test_tiles_hold_every_allowed_pair_once(docs, padding, rows):
    """Of the work lists: queries of a tile share their keys, and keys of a tile their branches."""
    segments = segment_table(docs, padding)
    T = padding + sum(prefix + sum(responses) for prefix, responses in docs)
    queries, keys = _C.attention_tiles(segments.numpy(), rows, 3)
    mask = attention_mask(segments, T).int()
    by_query, by_key = torch.zeros_like(mask), torch.zeros_like(mask)
    token = torch.arange(T)
    for q0, q1, own, prefix0, prefix1 in queries.tolist():
        assert 0 < q1 - q0 <= rows
        by_query[q0:q1, prefix0:prefix1] += 1
        by_query[q0:q1, own:q1] += (token[own:q1] <= token[q0:q1, None]).int()
    for k0, k1, own_end, branch0, branch1 in keys.tolist():
        assert 0 < k1 - k0 <= 3
        by_key[k0:own_end, k0:k1] += (token[k0:k1] <= token[k0:own_end, None]).int()
        by_key[branch0:branch1, k0:k1] += 1
    assert torch.equal(by_query, mask) and torch.equal(by_key, mask)
    for tiles, work in (
        (queries, lambda t: t[1] - t[2] + t[4] - t[3]),
        (keys, lambda t: t[2] - t[0] + t[4] - t[3]),
    ):
        order = [work(t) // min(rows, 3) for t in tiles.tolist()]
        assert order == sorted(order, reverse=True)


def test_tiles_of_a_table_that_is_none():
    with pytest.raises(ValueError, match="int32"):
        _C.attention_tiles(np.zeros((2, 4), np.int64), 8, 8)
    with pytest.raises(ValueError, match="1 or more"):
        _C.attention_tiles(np.zeros((1, 4), np.int32), 0, 8)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"q_TNH": torch.zeros(8, 3, 16)}, "3 heads and k_TKH has 2.*multiple"),
        ({"k_TKH": torch.zeros(8, 2, 8)}, r"k_TKH has shape.*\(8, K, 16\)"),
        ({"v_TKH": torch.zeros(7, 2, 16)}, "v_TKH has shape"),
        ({"v_TKH": torch.zeros(8, 2, 16).half()}, "v_TKH has dtype float16.*float32"),
        ({"q_TNH": torch.zeros(8, 64)}, r"q_TNH.*\(T, N, H\)"),
        ({"segments_S4": torch.tensor([[0, 7, 0, 0]], dtype=torch.int32)}, "covers 7"),
        ({"backend": "cuda"}, "packed_attention: backend='cuda'.*reference"),
    ],
)
def test_mistakes_are_named(change, rule):
    k = torch.zeros(8, 2, 16)
    good = {"q_TNH": torch.zeros(8, 4, 16), "k_TKH": k, "v_TKH": k}
    good["segments_S4"] = segment_table([], 8)
    with pytest.raises(ValueError, match=rule):
        packed_attention(**{**good, **change})


def test_the_mask_is_the_written_rule():
    table = [[0, 5, 0, 0], [5, 7, 0, 3], [7, 9, 7, 7]]
    mask = attention_mask(torch.tensor(table, dtype=torch.int32), 9)
    for start, end, prefix_start, prefix_end in table:
        for q in range(start, end):
            seen = {*range(start, q + 1), *range(prefix_start, prefix_end)}
            assert set(mask[q].nonzero().flatten().tolist()) == seen
