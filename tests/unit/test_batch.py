"""build_pack against a slow oracle that lays every document out by hand, and against math.md's
rules."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_sys.data.batch import Pack, build_pack


class MemoryStore:
    """The arrays of a TokenStore without the folder. documents: lists of parts, a part a list of
    (token, loss)."""

    def __init__(self, documents):
        parts = [part for document in documents for part in document]
        flat = [token for part in parts for token in part]
        self.documents = documents
        self.tokens = np.array([t for t, _ in flat], np.int32)
        self.loss = np.array([flag for _, flag in flat], np.uint8)
        self.part_offsets = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(
            np.int64
        )
        self.document_parts = np.concatenate([[0], np.cumsum([len(d) for d in documents])])


def oracle(documents, chosen, share_prefix):
    """Token by token: (token, segment, position, previous), rows, and segments, as math.md says."""
    tokens, segments, rows = [], [], []
    sequence = 0
    for d in chosen:
        prefix, *responses = documents[d]
        prefix_range = None
        for i, response in enumerate(responses):
            start = len(tokens)
            if i == 0 or not share_prefix:
                prefix_range = (start, start + len(prefix))
                tokens += [t for t, _ in prefix]
                segments.append((start, start + len(prefix) + len(response), start, start))
            else:
                segments.append((start, start + len(response), *prefix_range))
            previous = prefix_range[1] - 1 if prefix else -1
            for token, loss in response:
                if loss and previous >= 0:
                    rows.append((previous, token, sequence))
                previous = len(tokens)
                tokens.append(token)
            sequence += 1
    return tokens, segments, rows


TOKEN = st.tuples(st.integers(1, 99), st.integers(0, 1))
PREFIX = st.lists(st.tuples(st.integers(1, 99), st.just(0)), max_size=4)
DOCUMENT = st.tuples(
    PREFIX, st.lists(st.lists(TOKEN, min_size=1, max_size=4), min_size=1, max_size=4)
).map(lambda d: [d[0], *d[1]])


@settings(max_examples=300, deadline=None)
@given(st.lists(DOCUMENT, min_size=1, max_size=5), st.booleans(), st.integers(0, 7), st.data())
def test_against_the_oracle(documents, share_prefix, padding, data):
    store = MemoryStore(documents)
    chosen = data.draw(st.permutations(range(len(documents))))
    chosen = chosen[: data.draw(st.integers(0, len(documents)))]
    tokens, segments, rows = oracle(documents, chosen, share_prefix)
    length = len(tokens) + padding
    if length == 0:
        return
    ref_logp = -np.arange(sum(len(d) - 1 for d in documents), dtype=np.float64)
    pack = build_pack(store, chosen, length, share_prefix=share_prefix, ref_logp=ref_logp)
    assert pack.tokens_T.tolist() == tokens + [0] * padding
    if padding:
        segments.append((len(tokens), length, len(tokens), len(tokens)))
    assert [tuple(s) for s in pack.segments_S4.tolist()] == segments
    got = zip(pack.row_R.tolist(), pack.target_R.tolist(), pack.sequence_R.tolist(), strict=True)
    assert list(got) == rows
    first = np.cumsum([0] + [len(d) - 1 for d in documents])
    responses = [first[d] + i for d in chosen for i in range(len(documents[d]) - 1)]
    assert pack.response_B.tolist() == responses
    assert pack.document_P.tolist() == list(chosen)
    assert pack.ref_logp_B.tolist() == [-r for r in responses]
    assert (pack.num_tokens, pack.num_loss_tokens) == (len(tokens), len(rows))
    check_types(pack)


def check_types(pack: Pack):
    dtypes = dict.fromkeys(
        ("tokens_T", "row_R", "target_R", "sequence_R", "response_B", "document_P"), np.int64
    )
    for name, dtype in {**dtypes, "segments_S4": np.int32, "ref_logp_B": np.float64}.items():
        assert getattr(pack, name).dtype == dtype, name
    assert pack.segments_S4.shape[1] == 4


def document(prefix, *responses):
    return [[(t, 0) for t in prefix], *([(t, 1) for t in r] for r in responses)]


def test_a_pair_by_hand():
    store = MemoryStore([document([1, 2, 3], [4, 5], [6])])
    pack = build_pack(store, [0], 8, share_prefix=True)
    assert pack.tokens_T.tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    assert pack.segments_S4.tolist() == [[0, 5, 0, 0], [5, 6, 0, 3], [6, 8, 6, 6]]
    assert pack.row_R.tolist() == [2, 3, 2]  # the last prefix row stands once per response
    assert pack.target_R.tolist() == [4, 5, 6]
    assert pack.sequence_R.tolist() == [0, 0, 1]
    assert np.isnan(pack.ref_logp_B).all()
    apart = build_pack(store, [0], 9, share_prefix=False)
    assert apart.tokens_T.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 6]
    assert apart.segments_S4.tolist() == [[0, 5, 0, 0], [5, 9, 5, 5]]
    assert apart.row_R.tolist() == [2, 3, 7]
    assert apart.target_R.tolist() == pack.target_R.tolist()


def test_no_documents_is_all_padding():
    pack = build_pack(MemoryStore([document([1], [2])]), [], 16, share_prefix=True)
    assert pack.tokens_T.tolist() == [0] * 16
    assert pack.segments_S4.tolist() == [[0, 16, 0, 0]]
    for name in ("row_R", "target_R", "sequence_R", "response_B", "document_P", "ref_logp_B"):
        assert getattr(pack, name).shape == (0,)
    assert (pack.num_tokens, pack.num_loss_tokens) == (0, 0)
    check_types(pack)


def test_long_padding_is_cut_into_short_segments():
    pack = build_pack(MemoryStore([document([1], [2])]), [0], 300, share_prefix=True)
    assert pack.segments_S4.tolist() == [
        [0, 2, 0, 0],
        [2, 130, 2, 2],
        [130, 258, 130, 130],
        [258, 300, 258, 258],
    ]


def test_documents_must_fit():
    store = MemoryStore([document([1, 2], [3], [4])])
    build_pack(store, [0], 4, share_prefix=True)
    with pytest.raises(ValueError, match="1 documents of 6 tokens for a pack of 4"):
        build_pack(store, [0], 4, share_prefix=False)


def test_to_device_copies():
    pack = build_pack(MemoryStore([document([1, 2], [3], [4])]), [0], 6, share_prefix=True)
    on_device = pack.to("cpu")
    assert on_device.segments_S4.dtype == torch.int32
    assert on_device.tokens_T.tolist() == pack.tokens_T.tolist()
    assert on_device.num_loss_tokens == 2
    on_device.tokens_T.zero_()
    assert pack.tokens_T[0] == 1


def test_a_large_pack_is_built_quickly():
    rng = np.random.default_rng(0)
    store = MemoryStore([document(*rng.integers(1, 9, (3, 60)).tolist()) for _ in range(40)])
    best = min(
        timed(lambda: build_pack(store, range(40), 8192, share_prefix=True)) for _ in range(20)
    )
    assert best < 2e-3


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
