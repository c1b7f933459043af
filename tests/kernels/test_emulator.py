"""The emulator that runs our CUDA kernels on a CPU: each instruction does what it should, and broken rules are errors."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.kernels.emulation import emulated

SEEDS = range(3)  # eager, mixed and late asynchronous work


def call(name: str, *arguments: object) -> str:
    """The error's text, or an empty one."""
    message = ctypes.create_string_buffer(400)
    given = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    given = [ctypes.c_void_p(a) if i < 3 and a > 1 << 20 else a for i, a in enumerate(given)]
    getattr(emulated("self_test"), name)(*given, message, len(message))
    return message.value.decode()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("columns", "a_mn", "b_mn", "registers"),
    [(64, 0, 0, 0), (64, 0, 0, 1), (64, 0, 1, 0), (64, 0, 1, 1), (64, 1, 0, 0), (256, 1, 1, 0), (160, 0, 0, 1)],
)  # fmt: skip
def test_products(columns: int, a_mn: int, b_mn: int, registers: int, seed: int) -> None:
    a = torch.randint(-8, 9, (64, 64)).bfloat16()
    b = torch.randint(-8, 9, (columns, 64)).bfloat16()
    d = torch.full((64, columns), torch.nan)
    stored = (a.T.contiguous() if a_mn else a, b.T.contiguous() if b_mn else b)
    assert call("emulate_product", *stored, d, columns, a_mn, b_mn, registers, seed) == ""
    assert torch.equal(d, a.float() @ b.float().T)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("row", "col"), [(0, 0), (40, 16), (-8, 64), (90, 150)])
def test_copies_clip_at_the_edges(row: int, col: int, seed: int) -> None:
    """A load gives zeros outside the tensor, a store leaves out what is outside."""
    source = torch.randn(100, 184).bfloat16()
    copied = torch.full_like(source, torch.nan)
    assert call("emulate_copy", source, copied, 100, 184, row, col, seed) == ""
    inside = torch.zeros(100, 184, dtype=torch.bool)
    inside[max(row, 0) : row + 64, col : col + 64] = True
    assert torch.equal(copied[inside], source[inside]) and copied[~inside].isnan().all()


@pytest.mark.parametrize(
    ("which", "words"),
    [
        (0, "never initialised"),
        (1, "one arrival too many"),
        (2, "deadlock: 128 threads wait for an mbarrier"),
        (3, "deadlock: 64 threads wait for __syncthreads"),
        (4, "the threads of a warpgroup disagree"),
        (5, "deadlock: 31 threads wait for the other lanes"),
        (6, "a named barrier of 64 threads is used with 96"),
    ],
)
def test_broken_rules_are_errors(which: int, words: str) -> None:
    for seed in SEEDS:
        message = call("emulate_broken", which, seed)
        # either thread of the last one may come first
        assert (
            words in message
            or words.replace("64", "x").replace("96", "64").replace("x", "96") in message
        )
