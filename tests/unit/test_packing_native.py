"""The C++ packer and balancer: properties, and equality with a packer written the obvious way."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_kernels import _C


@st.composite
def packing_problems(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Lengths with many repeats and capacities that cross the 64-bit words of the free-space bitmap."""
    capacity = draw(st.one_of(st.integers(1, 300), st.sampled_from([4095, 4096, 4097, 300_000])))
    longest = draw(st.integers(1, capacity))
    lengths = draw(st.lists(st.integers(1, longest), max_size=120))
    return np.array(lengths, np.int32), capacity


def naive_best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    free: list[int] = []
    changed: list[int] = []  # when each pack last got a document
    for now, document in enumerate(np.argsort(-lengths.astype(np.int64), kind="stable")):
        length = int(lengths[document])
        fitting = [p for p in range(len(packs)) if free[p] >= length]
        if fitting:
            best = min(fitting, key=lambda p: (free[p], -changed[p]))
        else:
            best = len(packs)
            packs.append([])
            free.append(capacity)
            changed.append(0)
        packs[best].append(int(document))
        free[best] -= length
        changed[best] = now
    return packs


def first_fit(lengths: np.ndarray, capacity: int) -> int:
    free: list[int] = []
    for length in lengths.tolist():
        pack = next((p for p, space in enumerate(free) if space >= length), None)
        if pack is None:
            free.append(capacity - length)
        else:
            free[pack] -= length
    return len(free)


def fewest_packs(lengths: list[int], capacity: int) -> int:
    """The optimum, by trying every pack for every document."""
    best = len(lengths)

    def place(index: int, free: tuple[int, ...]) -> None:
        nonlocal best
        if len(free) >= best:
            return
        if index == len(lengths):
            best = len(free)
            return
        length = lengths[index]
        for space in set(free):
            if space >= length:
                rest = list(free)
                rest.remove(space)
                place(index + 1, (*rest, space - length))
        place(index + 1, (*free, capacity - length))

    place(0, ())
    return best


def packs_of(order: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [pack.tolist() for pack in np.split(order, offsets[1:-1])] if len(offsets) > 1 else []


def realistic_lengths(num_documents: int, capacity: int) -> np.ndarray:
    """Log-normal, like tokens of preference dialogues."""
    lengths = np.random.default_rng(7).lognormal(5.12, 0.73, num_documents)
    return np.clip(lengths, 1, capacity).astype(np.int32)


@given(packing_problems())
def test_every_document_once_and_no_pack_too_full(problem: tuple[np.ndarray, int]) -> None:
    lengths, capacity = problem
    order, offsets = _C.pack_best_fit_decreasing(lengths, capacity)
    assert (order.dtype, offsets.dtype) == (np.int32, np.int64)
    assert np.array_equal(np.sort(order), np.arange(len(lengths)))
    assert offsets[0] == 0 and offsets[-1] == len(lengths)
    assert (np.diff(offsets) > 0).all()
    for pack in packs_of(order, offsets):
        assert lengths[pack].sum(dtype=np.int64) <= capacity


@given(packing_problems())
def test_equals_the_obvious_packer(problem: tuple[np.ndarray, int]) -> None:
    lengths, capacity = problem
    packs = packs_of(*_C.pack_best_fit_decreasing(lengths, capacity))
    assert packs == naive_best_fit_decreasing(lengths, capacity)


@given(packing_problems())
def test_longest_first_and_equal_lengths_in_input_order(problem: tuple[np.ndarray, int]) -> None:
    lengths, capacity = problem
    for pack in packs_of(*_C.pack_best_fit_decreasing(lengths, capacity)):
        assert pack == sorted(pack, key=lambda document: (-int(lengths[document]), document))


@given(packing_problems())
def test_deterministic(problem: tuple[np.ndarray, int]) -> None:
    lengths, capacity = problem
    first = _C.pack_best_fit_decreasing(lengths, capacity)
    again = _C.pack_best_fit_decreasing(lengths.copy(), capacity)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@given(st.lists(st.integers(1, 20), max_size=8), st.integers(20, 40))
def test_within_the_guarantee_of_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    _, offsets = _C.pack_best_fit_decreasing(np.array(lengths, np.int32), capacity)
    num_packs, optimum = len(offsets) - 1, fewest_packs(lengths, capacity)
    assert optimum <= num_packs <= 11 / 9 * optimum + 1


@pytest.mark.parametrize("capacity", [512, 1024, 2048, 4096])
def test_fill_on_realistic_lengths(capacity: int) -> None:
    lengths = realistic_lengths(2312, capacity)
    num_packs = len(_C.pack_best_fit_decreasing(lengths, capacity)[1]) - 1
    assert lengths.sum() / (num_packs * capacity) >= 0.98
    assert num_packs <= first_fit(lengths, capacity)


def test_edges() -> None:
    none = np.zeros(0, np.int32)
    assert packs_of(*_C.pack_best_fit_decreasing(none, 8)) == []
    assert _C.pack_best_fit_decreasing(none, 8)[1].tolist() == [0]
    full = np.full(5, 8, np.int32)
    assert packs_of(*_C.pack_best_fit_decreasing(full, 8)) == [[0], [1], [2], [3], [4]]
    tiny = np.ones(17, np.int32)
    assert packs_of(*_C.pack_best_fit_decreasing(tiny, 8)) == [
        [*range(8)],
        [*range(8, 16)],
        [16],
    ]
    largest = 1 << 24
    lengths = np.array([1, largest, largest - 1], np.int32)
    assert packs_of(*_C.pack_best_fit_decreasing(lengths, largest)) == [[1], [2, 0]]


def test_reads_strided_and_read_only_arrays() -> None:
    both = realistic_lengths(200, 4096)
    strided = both[::2]
    strided.flags.writeable = False
    expected = _C.pack_best_fit_decreasing(strided.copy(), 4096)
    found = _C.pack_best_fit_decreasing(strided, 4096)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    [
        ([3, 0, 2], 8, r"lengths\[1\] is 0; a document has 1\.\.8 tokens"),
        ([3, 2, -5], 8, r"lengths\[2\] is -5"),
        ([3, 9], 8, r"lengths\[1\] is 9"),
        ([3], 0, "capacity is 0 tokens"),
        ([3], (1 << 24) + 1, "capacity is 16777217 tokens"),
    ],
)
def test_bad_values_are_named(lengths: list[int], capacity: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.pack_best_fit_decreasing(np.array(lengths, np.int32), capacity)


@pytest.mark.parametrize(
    "lengths", [np.ones(3, np.int64), np.ones(3, np.float32), np.ones((2, 2), np.int32)]
)
def test_other_arrays_are_refused(lengths: np.ndarray) -> None:
    with pytest.raises(ValueError, match="one-dimensional numpy array of int32"):
        _C.pack_best_fit_decreasing(lengths, 8)


def test_other_threads_run_meanwhile() -> None:
    lengths = realistic_lengths(3_000_000, 4096)
    began, ticks_s = threading.Event(), []
    finished = threading.Event()

    def tick() -> None:
        began.set()
        while not finished.is_set():
            ticks_s.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    began.wait()
    start_s = time.perf_counter()
    _C.pack_best_fit_decreasing(lengths, 4096)
    end_s = time.perf_counter()
    finished.set()
    thread.join()
    inside = [moment for moment in ticks_s if start_s < moment < end_s]
    assert len(inside) >= 3  # with the GIL held: none


@given(packing_problems(), st.integers(0, 3))
def test_redrawn_packs_hold_the_same_lengths(problem: tuple[np.ndarray, int], seed: int) -> None:
    lengths, capacity = problem
    order, offsets = _C.pack_best_fit_decreasing(lengths, capacity)
    rng = np.random.default_rng(seed)
    documents = rng.permutation(len(lengths)).astype(np.int32)
    packs = rng.permutation(len(offsets) - 1)
    redrawn, ends = _C.redraw_packs(lengths, order, offsets, documents, packs)
    assert (redrawn.dtype, ends.dtype) == (np.int32, np.int64)
    waiting = {length: [d for d in documents if lengths[d] == length] for length in set(lengths)}
    before = packs_of(order, offsets)
    expected = [[waiting[lengths[d]].pop(0) for d in pack] for pack in before]
    assert [list(pack) for pack in packs_of(redrawn, ends)] == [expected[i] for i in packs]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (1, [0, 0, 1], r"order\[1\] is 0; it must be a permutation of 0\.\.2"),
        (2, [0, 2, 2], "offsets must ascend from 0"),
        (2, [0, 4, 3], "offsets must ascend from 0"),
        (3, [0, 1, 3], r"documents\[2\] is 3"),
        (3, [0, 1], "must be equally long"),
        (4, [1, -1], r"packs\[1\] is -1"),
        (0, [5, 5, -1], "lengths go from -1 to 5"),
    ],
)
def test_what_is_no_plan_is_refused(place: int, value: list[int], message: str) -> None:
    given = [[5, 5, 9], [0, 1, 2], [0, 2, 3], [2, 1, 0], [1, 0]]
    given[place] = value
    types = (np.int32, np.int32, np.int64, np.int32, np.int64)
    arrays = [np.array(values, dtype) for values, dtype in zip(given, types, strict=True)]
    with pytest.raises(ValueError, match=message):
        _C.redraw_packs(*arrays)


works = st.lists(st.floats(0, 1e6, allow_subnormal=False), max_size=48)


@given(works, st.integers(1, 8))
def test_balance_gives_every_pack_once_and_ranks_equally_many(
    values: list[float], ranks: int
) -> None:
    work = np.array(values[: len(values) // ranks * ranks])
    rows = _C.balance_packs(work, ranks)
    assert rows.shape == (ranks, len(work) // ranks) and rows.dtype == np.int32
    assert np.array_equal(np.sort(rows.ravel()), np.arange(len(work)))
    assert (np.diff(rows, axis=1) > 0).all()
    assert np.array_equal(rows, _C.balance_packs(work.copy(), ranks))


@given(works, st.integers(2, 8))
def test_no_exchange_relieves_the_heaviest_rank(values: list[float], ranks: int) -> None:
    work = np.array(values[: len(values) // ranks * ranks])
    rows = _C.balance_packs(work, ranks)
    sums = work[rows].sum(axis=1)
    rounding = 1e-8 * sums.max()

    def can_be_relieved(heavy: int) -> bool:
        for light in range(ranks):
            gain = work[rows[heavy]][:, None] - work[rows[light]][None, :]
            after = np.maximum(sums[heavy] - gain, sums[light] + gain)
            if (after < sums[heavy] - rounding).any():
                return True
        return False

    heaviest = np.flatnonzero(
        sums >= sums.max() - rounding
    )  # one that is stuck decides the maximum
    assert not all(can_be_relieved(int(rank)) for rank in heaviest)


@pytest.mark.parametrize(("num_packs", "ranks"), [(16, 2), (64, 8), (512, 64)])
def test_balance_is_near_equal_on_realistic_work(num_packs: int, ranks: int) -> None:
    work = np.random.default_rng(3).lognormal(0, 0.3, num_packs)
    sums = work[_C.balance_packs(work, ranks)].sum(axis=1)
    in_order = work.reshape(ranks, -1).sum(axis=1)
    assert sums.max() / sums.mean() < 1.005 < in_order.max() / in_order.mean()


@pytest.mark.parametrize(
    ("work", "ranks", "message"),
    [
        ([1.0] * 5, 2, "ranks is 2 for 5 packs"),
        ([1.0], 0, "ranks is 0"),
        ([1.0, -1.0], 2, r"work\[1\] is -1"),
        ([1.0, np.nan], 2, r"work\[1\] is nan"),
        ([np.inf, 1.0], 2, r"work\[0\] is inf"),
    ],
)
def test_bad_work_is_named(work: list[float], ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.balance_packs(np.array(work), ranks)


def test_balance_refuses_other_arrays() -> None:
    with pytest.raises(ValueError, match="one-dimensional numpy array of float64"):
        _C.balance_packs(np.ones(4, np.float32), 2)


def test_short_documents_keep_their_order() -> None:
    """Long ones first; then the short ones as they came, each into the fullest pack with room."""
    lengths = np.array([2, 9, 1, 3, 7, 2, 1, 3], np.int32)
    order, offsets = _C.pack_best_fit_decreasing(lengths, 10, in_order_up_to=4)
    assert packs_of(order, offsets) == [[1, 6], [4, 0, 2], [3, 5, 7]]


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 80), st.integers(0, 80)
)
def test_any_bound_packs_every_document_once(lengths: list[int], capacity: int, bound: int) -> None:
    values = np.array(lengths, np.int32)
    packs = packs_of(*_C.pack_best_fit_decreasing(values, capacity, in_order_up_to=bound))
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(values[pack].sum() <= capacity for pack in packs)
    half_full = [values[pack].sum() <= capacity / 2 for pack in packs]
    assert sum(half_full) <= 1, "two packs that are at most half full could have been one"
