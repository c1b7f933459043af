"""Every benchmarked op: the test that must be green first, its inputs, its providers, and what one call is worth.

OPS are host code over numpy arrays; KERNELS are the ops of nova_kernels, whose cases live in ops_<name>.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ops_kv_shift_rope
import ops_linear_dpo
import ops_packed_attention
import torch
from timing import Case

from nova_kernels import _C
from nova_sys.data.packing import MIXED_BELOW


@dataclass(frozen=True, kw_only=True)
class Op:
    test: str
    """pytest arguments; the op is not measured while they fail."""
    cases: dict[str, Callable[[], Any]]
    """Name -> makes the input, the same each time."""
    providers: dict[str, Callable[[Any], Any]]
    """Name -> one call on an input; they are timed in turns."""
    unit: str
    """Speed is counted in these per second."""
    amount: Callable[[Any], float]
    """Input -> how many `unit`s one call handles."""
    quality: Callable[[Any, Any], dict[str, float]]
    """Input, output -> figures of the result itself."""


@dataclass(frozen=True)
class PackingInput:
    lengths: np.ndarray
    capacity: int


def preference_lengths(num_documents: int, capacity: int) -> PackingInput:
    """Log-normal, fitted to a prefix plus two responses of hh-rlhf at four characters per token."""
    lengths = np.random.default_rng(0).lognormal(5.12, 0.73, num_documents)
    return PackingInput(np.clip(lengths, 1, capacity).astype(np.int32), capacity)


def uniform_lengths(num_documents: int, capacity: int) -> PackingInput:
    """Every length equally likely: the most packs, the least reuse."""
    lengths = np.random.default_rng(0).integers(1, capacity + 1, num_documents, dtype=np.int32)
    return PackingInput(lengths, capacity)


def packing_quality(given: PackingInput, plan: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    num_packs = len(plan[1]) - 1
    fill = float(given.lengths.sum(dtype=np.int64) / (num_packs * given.capacity))
    return {"num_packs": num_packs, "fill_percent": 100 * fill}


OPS = {
    "packing": Op(
        test="tests/unit/test_packing_native.py",
        cases={
            "5M preference pairs, T=4096": lambda: preference_lengths(5_000_000, 4096),
            "5M preference pairs, T=512": lambda: preference_lengths(5_000_000, 512),
            "5M uniform lengths, T=4096": lambda: uniform_lengths(5_000_000, 4096),
        },
        providers={
            "short documents in order, as in training": lambda x: _C.pack_best_fit_decreasing(
                x.lengths, x.capacity, in_order_up_to=x.capacity // MIXED_BELOW
            ),
            "all by decreasing length": lambda x: _C.pack_best_fit_decreasing(
                x.lengths, x.capacity
            ),
        },
        unit="documents",
        amount=lambda x: len(x.lengths),
        quality=packing_quality,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Kernel:
    test: str
    """As in Op."""
    cases: Callable[[torch.device, bool, Sequence[str]], Iterator[Case]]
    """Device, tiny, backends -> what is timed there."""
    tuning: Callable[[torch.device, bool], Iterator[Case]] | None = None
    """Device, tiny -> candidates for the tables of a kernel's tile sizes, against each other."""


KERNELS = {
    "kv_shift_rope": Kernel(
        test="tests/kernels/test_kv_shift_rope.py", cases=ops_kv_shift_rope.cases
    ),
    "linear_dpo": Kernel(
        test="tests/kernels/test_linear_dpo_liger.py tests/kernels/test_linear_logprob.py",
        cases=ops_linear_dpo.cases,
        tuning=ops_linear_dpo.tuning,
    ),
    "packed_attention": Kernel(
        test="tests/kernels/test_packed_attention.py", cases=ops_packed_attention.cases
    ),
}
