"""Documents into packs, and packs onto data-parallel ranks; the work is done in C++
(`csrc/host/packing.cpp`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nova_kernels import _C  # pyright: ignore[reportAttributeAccessIssue] compiled


@dataclass(frozen=True)
class PackPlan:
    """order: int64 (num_documents,), documents grouped by pack.   offsets: int64 (num_packs +
    1,)."""

    order: np.ndarray
    offsets: np.ndarray

    @property
    def num_packs(self) -> int:
        return len(self.offsets) - 1

    def documents(self, pack: int) -> np.ndarray:
        """Documents of one pack, in the order in which they stand in it."""
        return self.order[self.offsets[pack] : self.offsets[pack + 1]]


def pack_documents(lengths: np.ndarray, capacity: int, *, seed: int, epoch: int) -> PackPlan:
    """Packs whole documents best-fit decreasing; every document stands in exactly one pack.

    Which of several equally long documents go together, and the order of the packs, depend on
    (seed, epoch); the number of packs does not.

    Args:     lengths (num_documents,) int32, tokens.   capacity: tokens per pack.
    Raises:   ValueError for a length outside 1..capacity.
    """
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(lengths))
    order, offsets = _C.pack_best_fit_decreasing(lengths[shuffled], capacity)
    order = shuffled[order]
    packs = rng.permutation(len(offsets) - 1)
    sizes = np.diff(offsets)[packs]
    new_offsets = np.concatenate([[0], np.cumsum(sizes)])
    places = np.repeat(offsets[packs] - new_offsets[:-1], sizes) + np.arange(len(order))
    return PackPlan(order[places], new_offsets)


def balance(work: np.ndarray, ranks: int) -> np.ndarray:
    """int32 (ranks, G / ranks): the packs of each rank, equally many, their work as equal as
    possible; deterministic.

    Args:     work (G,) float64, estimated cost of each pack.   ranks: a divisor of G.
    """
    return _C.balance_packs(work, ranks)
