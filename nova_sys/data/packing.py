"""Documents into packs, and packs onto data-parallel ranks; the work is done in C++ (`csrc/host/packing.cpp`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nova_kernels import _C

MIXED_BELOW = 4
"""Documents of at most 1/4 of a pack are placed in random order, longer ones longest first.

Best-fit decreasing sorts by length, and length says what a document is: of 40,000 short tasks of three kinds it made packs of one kind
each, and a model trained on them got stuck (docs/decisions.md). Placed at random behind the long ones, short documents cost
little (hh-rlhf: 99.5% instead of 99.9% filled at T=2048, the same at 4096), and every pack is a fair sample of them.
"""


@dataclass(frozen=True)
class PackPlan:
    """order: int32 (num_documents,), documents grouped by pack.   offsets: int64 (num_packs + 1,)."""

    order: np.ndarray
    offsets: np.ndarray

    @property
    def num_packs(self) -> int:
        return len(self.offsets) - 1

    def documents(self, pack: int) -> np.ndarray:
        """Documents of one pack, in the order in which they stand in it."""
        return self.order[self.offsets[pack] : self.offsets[pack + 1]]


def pack_documents(lengths: np.ndarray, capacity: int, *, seed: int, epoch: int) -> PackPlan:
    """Packs whole documents best-fit decreasing, short ones in random order; every document stands in exactly one pack.

    Which lengths share a pack depends on the seed. Which of several equally long documents stand there, and the order of the packs,
    depend on (seed, epoch); the number of packs does not depend on the epoch.

    Args:     lengths (num_documents,) int32, tokens.   capacity: tokens per pack.
    Memory:   4 bytes per document and 8 per pack for the result, 30 per document while it is made; malloc may keep these.
    Raises:   ValueError for a length outside 1..capacity.
    """
    shuffled = _permutation(np.random.default_rng([seed]), len(lengths))
    order, offsets = _C.pack_best_fit_decreasing(
        lengths[shuffled], capacity, in_order_up_to=capacity // MIXED_BELOW
    )
    order = shuffled[order]
    rng = np.random.default_rng([seed, epoch])
    documents = _permutation(rng, len(lengths))
    packs = rng.permutation(len(offsets) - 1)
    return PackPlan(*_C.redraw_packs(lengths, order, offsets, documents, packs))


def _permutation(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.permutation(size).astype(np.int32)


def balance(work: np.ndarray, ranks: int) -> np.ndarray:
    """int32 (ranks, G / ranks): the packs of each rank, equally many, their work as equal as possible; deterministic.

    Args:     work (G,) float64, estimated cost of each pack.   ranks: a divisor of G.
    """
    return _C.balance_packs(work, ranks)
