"""Segment tables: positions, previous tokens and the rules, against a token-by-token definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_kernels.segments import (
    positions,
    previous_token,
    schedule_of,
    segment_ids,
    segment_index,
    validate_segments,
)
from nova_kernels.testing import random_segments, segment_table

documents = st.lists(
    st.tuples(st.integers(0, 5), st.lists(st.integers(1, 4), min_size=1, max_size=4)), max_size=5
)


def by_hand(table: list[list[int]]) -> tuple[list[int], list[int], list[int]]:
    """Segment, position and previous token of each token, by the rules of the design's page."""
    segment, position, previous = [], [], []
    for number, (start, end, prefix_start, prefix_end) in enumerate(table):
        for token in range(start, end):
            segment.append(number)
            position.append(prefix_end - prefix_start + token - start)
            if token > start:
                previous.append(token - 1)
            else:
                previous.append(prefix_end - 1 if prefix_end > prefix_start else -1)
    return segment, position, previous


@given(documents, st.integers(0, 4))
@settings(deadline=None, max_examples=60)
def test_index_equals_the_definition(docs, padding):
    table = segment_table(docs, padding)
    T = padding + sum(prefix + sum(responses) for prefix, responses in docs)
    segment, position, previous = by_hand(table.tolist())
    assert segment_ids(table, T).tolist() == segment
    assert positions(table, T).tolist() == position
    assert previous_token(table, T).tolist() == previous

    index = segment_index(table, T)
    assert index.position_T.tolist() == position and index.previous_T.tolist() == previous
    assert index.num_tokens == T and index.num_positions == max(position, default=-1) + 1
    assert index.break_I.tolist() == [start for start, end, _, _ in table.tolist() if end > start]
    assert {*zip(index.branch_J.tolist(), index.branch_previous_J.tolist(), strict=True)} == {
        (start, end - 1) for start, _, first, end in table.tolist() if end > first
    }


def test_the_picture_of_the_module():
    table = segment_table([(3, [2, 2, 1])], padding=3)
    assert table.tolist() == [[0, 5, 0, 0], [5, 7, 0, 3], [7, 8, 0, 3], [8, 11, 8, 8]]
    assert positions(table, 11).tolist() == [0, 1, 2, 3, 4, 3, 4, 3, 0, 1, 2]
    assert previous_token(table, 11).tolist() == [-1, 0, 1, 2, 3, 2, 5, 2, -1, 8, 9]


def test_empty_segments_and_an_empty_pack():
    table = torch.tensor(
        [[0, 2, 0, 0], [2, 2, 0, 1], [2, 4, 0, 1], [4, 4, 4, 4]], dtype=torch.int32
    )
    assert previous_token(table, 4).tolist() == [-1, 0, 0, 2]
    index = segment_index(table, 4)
    assert index.break_I.tolist() == [0, 2] and index.branch_J.tolist() == [2]
    assert segment_index(segment_table([], 0), 0).num_positions == 0


@pytest.mark.parametrize(
    ("rows", "T", "rule"),
    [
        ([[0, 4, 0, 0], [5, 8, 5, 5]], 8, "row 1.*start must be 4"),
        ([[1, 8, 1, 1]], 8, "row 0.*start must be 0"),
        ([[0, 4, 0, 0], [4, 3, 4, 4]], 8, "row 1.*end must lie"),
        ([[0, 9, 0, 0]], 8, "row 0.*8 tokens"),
        ([[0, 6, 0, 0]], 8, r"covers 6 of the pack's 8.*\[6, 8, 6, 6\]"),
        ([[0, 4, 0, 0], [4, 8, 3, 1]], 8, "must not end before"),
        ([[0, 4, 0, 0], [4, 8, 1, 3]], 8, "tokens 0 to 4"),
        ([[0, 4, 0, 0], [4, 8, 0, 5]], 8, "tokens 0 to 4"),
        ([[0, 4, 0, 0], [4, 6, 4, 4], [6, 8, 0, 2]], 8, "tokens 4 to 6"),
        ([[0, 8, 0, 8]], 8, "last trunk before it"),
    ],
)
def test_broken_tables_are_refused(rows, T, rule):
    with pytest.raises(ValueError, match=rule):
        validate_segments(torch.tensor(rows, dtype=torch.int32), T)


def test_wrong_types_and_schedules_are_refused():
    with pytest.raises(ValueError, match=r"int64.*int32"):
        validate_segments(torch.tensor([[0, 8, 0, 0]]), 8)
    with pytest.raises(ValueError, match=r"\(S, 4\)"):
        validate_segments(torch.zeros(1, 3, dtype=torch.int32), 8)
    index = segment_index(segment_table([], 8), 8)
    assert schedule_of(index, segment_table([], 8), 8) is index
    with pytest.raises(ValueError, match="8 tokens, but this pack has 9"):
        schedule_of(index, segment_table([], 9), 9)


def test_random_segments_are_valid_and_varied():
    tables = [random_segments(np.random.default_rng(seed), 60) for seed in range(50)]
    for table in tables:
        validate_segments(table, 60)
    rows = torch.cat(tables)
    assert (rows[:, 3] > rows[:, 2]).any() and (rows[:, 1] - rows[:, 0] == 1).any()
