"""packed_attention with a window: the blocked path and the Triton kernels against the written rule and FlexAttention."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from nova_kernels import packed_attention
from nova_kernels.packed_attention import reference
from nova_kernels.packed_attention.reference import attention_mask, dense_attention
from nova_kernels.segments import positions, segment_index
from nova_kernels.testing import (
    assert_close_to,
    max_error,
    poison,
    random_segments,
    segment_table,
)
from tests.kernels.test_packed_attention import (
    NAMES,
    assert_equal_to_rounding,
    documents,
    inputs,
    run,
    small_triton_tiles,  # noqa: F401 a fixture
)


def dense(segments, window):
    return lambda q, k, v: dense_attention(q, k, v, segments, window=window)[0]


def packed(segments, window, **options):
    return functools.partial(packed_attention, segments_S4=segments, window=window, **options)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 9])
def test_the_mask_is_the_written_rule(window):
    """Each sequence by itself: its tokens in order, of which the last `window` are seen."""
    segments = segment_table([(3, [2, 4]), (0, [5])], padding=2)
    mask = attention_mask(segments, 16, window)
    sequences = [range(5), [0, 1, 2, 5, 6, 7, 8], range(9, 14), range(14, 16)]
    for sequence in map(list, sequences):
        for place, token in enumerate(sequence):
            expected = set(sequence[max(0, place + 1 - window) : place + 1])
            assert set(mask[token].nonzero().flatten().tolist()) == expected


@given(
    docs=documents,
    padding=st.integers(0, 9),
    block_rows=st.sampled_from([2, 5, 64]),
    window=st.integers(1, 20),
)
@settings(deadline=None, max_examples=60)
def test_any_table_matches_the_dense_mask(docs, padding, block_rows, window):
    segments = segment_table(docs, padding)
    T = padding + sum(prefix + sum(responses) for prefix, responses in docs)
    args = inputs(T, N=4, K=2, H=8)
    with pytest.MonkeyPatch.context() as patch, poison():
        patch.setattr(reference, "BLOCK_ROWS", block_rows)
        got = run(packed(segments, window), *args)
    if T:
        assert_equal_to_rounding(got, run(dense(segments, window), *args))


def test_a_window_that_reaches_everything_changes_no_bit():
    segments = random_segments(np.random.default_rng(0), 300, max_prefix=60, max_response=40)
    args = inputs(300, 4, 2, 16, torch.float32)
    longest = segment_index(segments, 300).num_positions
    without = run(packed(segments, 0), *args)
    for a, b in zip(without, run(packed(segments, longest), *args), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(without[0], packed_attention(*args[:3], segments, window=longest - 1))


def test_log_sum_exp_and_recomputed_probabilities(monkeypatch):
    segments = random_segments(np.random.default_rng(2), 400, max_prefix=150, max_response=90)
    args = inputs(400, 4, 2, 16)
    _, lse = packed_attention(*args[:3], segments, window=50, return_lse=True)
    _, expected = dense_attention(*args[:3], segments, window=50)
    assert max_error(expected, lse) < 1e-13
    kept = run(packed(segments, 50), *args)
    monkeypatch.setattr(reference, "KEEP_BYTES", 0)
    again = run(packed(segments, 50), *args)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_equals_flex_attention_with_a_sliding_window():
    T, window = 150, 17
    segments = segment_table([(40, [30, 20, 1]), (0, [50])], padding=9)
    base = attention_mask(segments, T)
    position_T = positions(segments, T)

    def allowed(_b, _h, q_i, k_i):
        return base[q_i, k_i] & (position_T[q_i] - position_T[k_i] < window)

    q, k, v = (x.detach() for x in inputs(T, N=4, K=2, H=32)[:3])
    mask = create_block_mask(allowed, None, None, T, T, device="cpu")
    batch = [x.transpose(0, 1)[None] for x in (q, k, v)]
    expected = flex_attention(*batch, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    assert max_error(expected, packed_attention(q, k, v, segments, window=window)) < 1e-13


@pytest.mark.parametrize(
    ("heads", "window"), [*(((8, 2), w) for w in (1, 16, 21, 52)), ((4, 4), 7), ((4, 4), 40)]
)
@pytest.mark.usefixtures("small_triton_tiles")
def test_triton_matches_the_dense_mask(heads, window):
    """The window's edge in trunks, in prefixes and between the two; scratch and padding poisoned."""
    segments = segment_table([(37, [3, 40, 1]), (0, [5, 1]), (16, [20, 17])], padding=9)
    args = inputs(int(segments[-1, 1]), *heads, 64, torch.float32)
    dirty = [x.detach().clone() for x in args]
    for x in dirty[:3]:
        x[-9:] = float("nan")
    dirty = [x.requires_grad_() for x in dirty[:3]] + dirty[3:]
    wide = [x.detach().double().requires_grad_() for x in args[:3]]
    exact = run(dense(segments, window), *wide, args[3].double())
    with poison():
        got = run(packed(segments, window, backend="triton"), *dirty)
    plain = run(dense(segments, window), *args)
    for name, *values in zip(NAMES, exact, got, plain, strict=True):
        # With few keys plain torch is nearly exact (with one, its dq and dk are 0).
        assert_close_to(*(x[:-9] for x in values), slack=4e-6, what=name)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(32, 8, 128), (16, 4, 64), (40, 8, 128)])
@pytest.mark.parametrize("window", [100, 1024])
def test_triton_on_a_gpu(shape, window):
    for segments in (
        segment_table([(1500, [100, 700, 300])], padding=1495),
        segment_table([], 4095),
    ):
        args = [x.detach().cuda() for x in inputs(4095, *shape, torch.bfloat16)]
        args = [x.requires_grad_() for x in args[:3]] + args[3:]
        options = {"schedule": segment_index(segments, 4095).to("cuda")}
        with poison():
            got = run(packed(segments, window, backend="triton", **options), *args)
        again = run(packed(segments, window, backend="triton", **options), *args)
        wide = [x.detach().double().requires_grad_() for x in args[:3]] + [args[3].double()]
        exact = run(packed(segments, window, backend="reference", **options), *wide)
        plain = run(packed(segments, window, backend="reference", **options), *args)
        for name, *values in zip(NAMES, exact, got, plain, strict=True):
            slack = 4 * torch.finfo(torch.bfloat16).eps * float(values[0].abs().max())
            assert_close_to(*values, slack=slack, what=name)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_a_negative_window_is_refused():
    q, k, v, _ = inputs(8, 4, 2, 16)
    with pytest.raises(ValueError, match=r"window is -1.*itself included"):
        packed_attention(q, k, v, segment_table([], 8), window=-1)
