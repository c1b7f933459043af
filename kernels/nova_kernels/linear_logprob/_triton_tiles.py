"""Tile sizes of the Triton kernels: no torch, no Triton.

Nothing here depends on the GPU's number of multiprocessors, so no result does either.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    rows: int
    columns: int  # split in two halves after the product
    depth: int
    warps: int
    stages: int


class Rule(NamedTuple):
    itemsize: int  # at most
    rows: int  # at most
    crowded: bool  # also for kernels that keep exponentials and track entropy or argmax
    tile: Tile


# The first rule that fits is taken. What Triton makes of each, compiled for sm_90, stands in the
# README; a test keeps them free of spills. D and V have their say in split_rows and in the waves.
ANY = 1 << 62
RULES = (
    Rule(2, 64, True, Tile(64, 128, 64, 4, 4)),  # W is read once whatever the tile: many programs
    Rule(2, ANY, False, Tile(128, 256, 64, 8, 4)),  # the least L2 traffic that fits registers
    Rule(2, ANY, True, Tile(128, 128, 64, 8, 4)),
    Rule(4, ANY, True, Tile(64, 64, 32, 8, 3)),  # fp32 without tensor cores: exact, not fast
)
# What `python benchmarks/run.py --op linear_dpo --tune` times against each other.
CANDIDATES = (
    Tile(128, 256, 64, 8, 4),
    Tile(128, 256, 64, 8, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(64, 256, 64, 4, 4),
    Tile(64, 128, 64, 4, 4),
)


def choose_tile(num_rows: int, itemsize: int, *, crowded: bool) -> Tile:
    return next(
        rule.tile
        for rule in RULES
        if itemsize <= rule.itemsize and num_rows <= rule.rows and crowded <= rule.crowded
    )
