"""Packing and loading: every document once per epoch, whatever the layout; a pure function of step
and seed."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_kernels import _C, packed_attention
from nova_kernels.backend import triton_runs_on
from nova_kernels.packed_attention import schedule as schedule_module
from nova_kernels.segments import segment_index
from nova_kernels.testing import segment_table
from nova_sys.data import batch as batch_module
from nova_sys.data import loader as loader_module
from nova_sys.data.loader import PackLoader
from nova_sys.data.packing import balance, pack_documents

CAPACITY = 32


class LengthStore:
    """Documents of the given lengths, one SFT response each; token = document number + 1."""

    def __init__(self, lengths):
        ends = np.cumsum(lengths)
        self.part_offsets = np.append(np.repeat(ends - lengths, 2), ends[-1])  # empty prefixes
        self.document_parts = np.arange(len(lengths) + 1) * 2
        self.tokens = np.repeat(np.arange(len(lengths)) + 1, lengths).astype(np.int32)
        self.loss = np.ones(len(self.tokens), np.uint8)
        self._lengths = np.array(lengths, np.int32)

    def document_lengths(self, share_prefix):
        return self._lengths

    def document_work(self, documents, share_prefix):
        return self._lengths[documents].astype(np.float64) ** 2

    def source_of(self, document):
        return f"file:{document + 1}"


def make(lengths, rank=0, size=1, **options):
    options = {"global_batch_packs": 4, "seed": 1} | options
    return PackLoader(
        LengthStore(lengths),
        pack_length=CAPACITY,
        data_rank=rank,
        data_size=size,
        share_prefix=True,
        **options,
    )


LENGTHS = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(0, 5), st.integers(0, 5))
def test_packing(lengths, seed, epoch):
    lengths = np.array(lengths, np.int32)
    plan = pack_documents(lengths, CAPACITY, seed=seed, epoch=epoch)
    assert sorted(plan.order) == list(range(len(lengths)))
    assert plan.offsets[0] == 0 and plan.offsets[-1] == len(lengths)
    sums = [lengths[plan.documents(i)].sum() for i in range(plan.num_packs)]
    assert all(0 < s <= CAPACITY for s in sums)
    assert sum(s <= CAPACITY // 2 for s in sums) <= 1  # two half-empty packs would have been one
    again = pack_documents(lengths, CAPACITY, seed=seed, epoch=epoch)
    assert np.array_equal(plan.order, again.order)
    assert np.array_equal(plan.offsets, again.offsets)
    assert pack_documents(lengths, CAPACITY, seed=seed, epoch=epoch + 1).num_packs == plan.num_packs


def test_epochs_and_seeds_differ():
    lengths = np.full(64, 8, np.int32)
    plans = [pack_documents(lengths, CAPACITY, seed=s, epoch=e) for s in (0, 1) for e in (0, 1)]
    together = [{frozenset(p.documents(i).tolist()) for i in range(p.num_packs)} for p in plans]
    assert len({frozenset(t) for t in together}) == 4  # who shares a pack
    mixed = np.arange(1, 33, dtype=np.int32)  # all lengths differ: only the order of packs can
    orders = {tuple(pack_documents(mixed, CAPACITY, seed=0, epoch=e).order) for e in range(4)}
    assert len(orders) == 4


def test_longer_than_a_pack():
    with pytest.raises(ValueError, match="33"):
        pack_documents(np.array([33], np.int32), CAPACITY, seed=0, epoch=0)
    with pytest.raises(ValueError, match=r"file:2: the document takes 33 tokens, a pack has 32"):
        make([4, 33])


def test_balance_evens_the_work():
    work = np.array([9.0, 1, 8, 2, 7, 3, 6, 4])
    groups = balance(work, 4)
    assert sorted(groups.ravel()) == list(range(8))
    assert [work[g].sum() for g in groups] == [10, 10, 10, 10]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(0, 3))
def test_each_document_once_per_epoch_on_any_layout(lengths, seed):
    loaders = {
        size: [make(lengths, r, size, epochs=2, seed=seed) for r in range(size)]
        for size in (1, 2, 4)
    }
    one = loaders[1][0]
    steps = one.steps_for(2)
    seen = []
    for step in range(steps):
        by_size = {}
        for size, ranks in loaders.items():
            packs = [pack for loader in ranks for pack in loader.micro_batches(step)]
            assert len(packs) == 4
            by_size[size] = sorted(pack.document_P.tolist() for pack in packs)
        assert by_size[1] == by_size[2] == by_size[4]
        seen += [d for pack in one.documents_of(step) for d in pack]
        tokens = np.concatenate([p.tokens_T for p in one.micro_batches(step)])
        step_documents = np.concatenate(one.documents_of(step))
        assert np.array_equal(np.unique(tokens[tokens > 0]), np.unique(step_documents) + 1)
    assert sorted(seen) == sorted([*range(len(lengths))] * 2)
    first_epoch = seen[: len(lengths)]
    assert sorted(first_epoch) == list(range(len(lengths)))
    for step in (steps, steps + 3):
        assert all(pack.num_tokens == 0 for pack in one.micro_batches(step))


def test_pure_in_step_and_endless_without_epochs():
    lengths = np.random.default_rng(0).integers(1, CAPACITY, 50)
    forward, backward = make(lengths), make(lengths)
    steps = 3 * forward.packs_per_epoch // 4 + 2
    expected = [[p.tokens_T.tolist() for p in forward.micro_batches(s)] for s in range(steps)]
    for step in reversed(range(steps)):
        assert [p.tokens_T.tolist() for p in backward.micro_batches(step)] == expected[step]
    assert forward.last_pack is None
    assert len(forward._plans) <= 2  # memory does not grow with the epochs
    assert all(p.num_tokens > 0 for s in (steps, 100 * steps) for p in forward.micro_batches(s))


def test_last_step_is_filled_with_empty_packs():
    loader = make([CAPACITY] * 10, epochs=0.5)  # 10 packs, 5 wanted, 4 per step
    assert (loader.packs_per_epoch, loader.last_pack, loader.steps_for(0.5)) == (10, 5, 2)
    assert [p.num_tokens for p in loader.micro_batches(0)] == [CAPACITY] * 4
    assert sorted(p.num_tokens for p in loader.micro_batches(1)) == [0, 0, 0, CAPACITY]
    assert loader.fill == 1.0
    assert make([CAPACITY] * 50, epochs=1.1).last_pack == 55  # 1.1 * 50 is a little over 55


def test_work_is_balanced_over_ranks():
    lengths = [
        32,
        32,
        8,
        8,
        8,
        8,
    ] * 8  # packs of one long document cost four times as much as packs of four
    ranks = [make(lengths, r, 2, global_batch_packs=24) for r in range(2)]
    costs = [
        sum(float((np.array(lengths)[p.document_P] ** 2).sum()) for p in loader.micro_batches(0))
        for loader in ranks
    ]
    assert costs[0] == costs[1]


def test_global_batch_must_divide():
    with pytest.raises(ValueError, match="global_batch_packs is 6 and the data-parallel size 4"):
        make([1], 0, 4, global_batch_packs=6)


def test_prefetching_gives_the_same_batches_from_any_step():
    loader = make([5, 9, 30, 12, 7] * 6)
    for start in (3, 0):
        loader.start(start)
        for step in range(start, start + 6):
            got = [p.tokens_T.tolist() for p in loader.next()]
            assert got == [p.tokens_T.tolist() for p in loader.micro_batches(step)]
    thread = loader._thread._thread
    loader.stop()
    assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="before start"):
        loader.next()


def test_the_next_epoch_is_planned_before_it_is_needed(monkeypatch):
    """The plan of epoch 1 takes as long as it likes: every step of epoch 0 is there meanwhile."""
    asked, allowed = threading.Event(), threading.Event()

    def slow(lengths, capacity, *, seed, epoch):
        if epoch == 1:
            asked.set()
            assert allowed.wait(60)
        return pack_documents(lengths, capacity, seed=seed, epoch=epoch)

    expected = make([CAPACITY] * 42)
    monkeypatch.setattr("nova_sys.data.loader.pack_documents", slow)
    loader = make([CAPACITY] * 42)  # 42 packs, 4 per step: step 10 spans both epochs
    loader.start(0)
    steps = [loader.next()]
    assert asked.wait(60)  # with the first step, not when the epoch ends
    steps += [loader.next() for _ in range(9)]
    assert not allowed.is_set()
    allowed.set()
    steps += [loader.next() for _ in range(5)]
    for step, packs in enumerate(steps):
        tokens = [pack.tokens_T.tolist() for pack in packs]
        assert tokens == [pack.tokens_T.tolist() for pack in expected.micro_batches(step)]
    loader.stop()
    assert [t.name for t in threading.enumerate() if t.name.startswith("pack-")] == []


@pytest.mark.parametrize(("epochs", "planned"), [(1.0, 0), (1.02, 1), (None, 1)])
def test_no_epoch_is_planned_that_is_not_needed(monkeypatch, epochs, planned):
    asked = []

    def noting(lengths, capacity, *, seed, epoch):
        asked.append(epoch)
        return pack_documents(lengths, capacity, seed=seed, epoch=epoch)

    monkeypatch.setattr("nova_sys.data.loader.pack_documents", noting)
    loader = make([CAPACITY] * 50, epochs=epochs)
    loader.start(0)
    loader.next()
    loader.stop()
    assert max(asked) == planned and len(asked) == planned + 1


def test_a_plan_that_fails_is_told_where_its_step_is_taken(monkeypatch):
    def fail(lengths, capacity, *, seed, epoch):
        if epoch == 1:
            raise MemoryError("no room")
        return pack_documents(lengths, capacity, seed=seed, epoch=epoch)

    monkeypatch.setattr("nova_sys.data.loader.pack_documents", fail)
    loader = make([CAPACITY] * 8)
    loader.start(0)
    assert len(loader.next()) == len(loader.next()) == 4
    with pytest.raises(MemoryError, match="no room"):
        loader.next()
    loader.stop()


def test_an_error_in_the_thread_reaches_the_caller(monkeypatch):
    loader = make([5, 9, 30])

    def fail(step):
        raise OSError("disk gone")

    monkeypatch.setattr(loader, "micro_batches", fail)
    loader.start(0)
    for _ in range(2):
        with pytest.raises(OSError, match="disk gone"):
            loader.next()
    loader.stop()


def test_packs_are_fair_samples_of_short_documents():
    """Sorted by length, nearly every pack would hold documents of one length only."""
    lengths = np.array([2, 3] * 300, np.int32)
    plan = pack_documents(lengths, CAPACITY, seed=3, epoch=0)
    kinds = [len(set(lengths[plan.documents(i)])) for i in range(plan.num_packs)]
    assert np.mean(kinds) > 1.9
    again = pack_documents(lengths, CAPACITY, seed=3, epoch=1)
    assert again.num_packs == plan.num_packs
    assert set(plan.documents(0)) != set(again.documents(0))


def test_no_step_waits_for_data_or_for_the_next_epochs_plan(monkeypatch):
    """A plan takes as long as six steps; an epoch has ten."""

    def slow_plan(*arguments, **options):
        time.sleep(0.3)
        return pack_documents(*arguments, **options)

    monkeypatch.setattr(loader_module, "pack_documents", slow_plan)
    loader = make([CAPACITY] * 40)
    loader.start(3)
    waits_s = []
    for _ in range(25):  # across two ends of an epoch
        began = time.perf_counter()
        loader.next()
        waits_s.append(time.perf_counter() - began)
        time.sleep(0.05)
    loader.stop()
    assert max(waits_s[1:]) < 0.1
    assert sorted(waits_s[1:])[len(waits_s) // 2] < 0.002


def test_what_layers_need_of_a_pack_is_made_in_the_loaders_thread(monkeypatch):
    """The index of segments and the lists of tiles; they move with the pack, and nothing makes them again."""
    made = []

    def noting(function):
        def call(*arguments):
            made.append((function.__name__, threading.current_thread().name))
            return function(*arguments)

        return call

    monkeypatch.setattr(batch_module, "segment_index", noting(batch_module.segment_index))
    attention_tiles = _C.attention_tiles
    monkeypatch.setattr(_C, "attention_tiles", noting(attention_tiles))
    loader = make([7, 5, 3, 9] * 4, tile_sizes=[(8, 4), (4, 4)])
    loader.start(0)
    packs = loader.next()
    loader.stop()
    assert {thread for _, thread in made} == {"pack-loader"}
    made.clear()
    on_device = packs[0].with_reference(packs[0].ref_logp_B).to("cpu")
    queries, keys = schedule_module.attention_schedule(on_device.index, 8, 4)
    assert made == [] and set(on_device.index.attention_tiles) == {(8, 4), (4, 4)}
    expected = attention_tiles(packs[0].segments_S4, 8, 4)
    assert all(np.array_equal(a, b) for a, b in zip((queries, keys), expected, strict=True))


@pytest.mark.skipif(not triton_runs_on(torch.device("cpu")), reason="Triton is not installed")
@pytest.mark.parametrize(("N", "K", "H"), [(4, 2, 64), (6, 2, 64), (2, 2, 128)])
def test_the_tile_sizes_are_those_that_the_attention_asks_for(N, K, H):
    segments = segment_table([(5, [3, 4])], 0)
    index = segment_index(segments, 12)
    q, k, v = (torch.randn(12, X, H, requires_grad=True) for X in (N, K, K))
    packed_attention(q, k, v, segments, schedule=index, backend="triton").sum().backward()
    assert set(index.attention_tiles) == set(schedule_module.tile_sizes(N, K, H, "triton"))
    assert schedule_module.tile_sizes(N, K, H, "auto") == []
    for backend in ("triton", "cuda"):  # what an op does not take it says itself
        assert schedule_module.tile_sizes(N, K, 320, backend) == []
