"""Theorem 2 of arXiv 2411.19574: one layer, one head with KV shifting is an exact induction head; one without is not."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_kernels import kv_shift_rope, packed_attention
from nova_kernels.segments import segment_ids
from nova_kernels.testing import segment_table
from nova_sys.data.induction import induction_sequence

NUM_IDS = 16
SHARP = 60.0  # scores differ by 60^2 / sqrt(16) = 900 nats: exp(-900) is 0 in fp64

documents = st.lists(
    st.tuples(st.integers(0, 9), st.lists(st.integers(1, 9), min_size=1, max_size=3)),
    min_size=1,
    max_size=3,
)


def head(tokens, segments, k_mix, v_mix):
    """(T, NUM_IDS): attention of one head with identity projections over one-hot embeddings, without positions."""
    x = torch.nn.functional.one_hot(tokens, NUM_IDS).double()[:, None]
    flat = (torch.ones(len(tokens), 1), torch.zeros(len(tokens), 1))
    q, k, v = kv_shift_rope(SHARP * x, SHARP * x, x, segments, k_mix, v_mix, *flat)
    return packed_attention(q, k, v, segments)[:, 0]


def own_sequence(segments, tokens, t):
    """The tokens that token t continues, and itself: its prefix and its segment."""
    start, _, prefix_start, prefix_end = segments[segment_ids(segments, len(tokens))[t]].tolist()
    return torch.cat([tokens[prefix_start:prefix_end], tokens[start : t + 1]])


@given(docs=documents, seed=st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_kv_shifting_is_an_exact_induction_head(docs, seed):
    """Where a token was there before, the output is the mean of the tokens that followed it; on packs with branches."""
    segments = segment_table(docs, 0)
    T = int(segments[-1, 1])
    tokens = torch.randint(0, 5, (T,), generator=torch.Generator().manual_seed(seed))
    out = head(tokens, segments, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    for t in range(T):
        sequence = own_sequence(segments, tokens, t)
        followed = sequence[1:][sequence[:-1] == sequence[-1]]
        if len(followed):
            expected = torch.nn.functional.one_hot(followed, NUM_IDS).double().mean(0)
            assert (out[t] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("kv_shift", [True, False])
def test_it_answers_the_induction_task(kv_shift):
    """Exactly where every earlier occurrence had the same successor. Without the shift the same head copies its own token."""
    rng, right, total = random.Random(0), 0, 0
    for _ in range(50):
        ids, answers = induction_sequence(rng, length=40, num_distinct=12, num_ids=NUM_IDS - 1)
        tokens, segments = torch.tensor(ids), segment_table([], len(ids))
        mix = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        out = head(tokens, segments, *(mix if kv_shift else (None, None)))
        for place in answers:
            asked = tokens[place - 1]
            followed = {ids[i + 1] for i in range(place - 1) if ids[i] == asked}
            if len(followed) == 1:
                total += 1
                right += int(out[place - 1].argmax()) == ids[place]
    assert total > 300
    assert right == (total if kv_shift else 0)
