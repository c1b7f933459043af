"""Safetensors files written one tensor at a time: the header, which comes first, needs shapes and dtypes only."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nova_sys.hf.folder import DTYPES, INDEX, SINGLE

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8
"""The data begins at a multiple of it: the format asks for that, since files are mapped into memory."""


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_sharded(
    folder: Path, planned: Sequence[Planned], tensors: Iterable[torch.Tensor], *, shard_bytes: int
) -> None:
    """Writes `tensors`, in the order of `planned`, into files of at most `shard_bytes` of them each (a larger tensor has a file of
    its own), and the index when there are several. Each tensor is asked for when the one before is written."""
    shards = _shards(planned, shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = [SINGLE] if len(shards) == 1 else names
    source = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header(shard))
            for plan in shard:
                tensor = next(source)
                assert (tensor.shape, tensor.dtype) == (plan.shape, plan.dtype), plan.name
                file.write(tensor.contiguous().view(torch.uint8).numpy().data)
                del tensor  # else it would be there while the next one is made
    if len(shards) > 1:
        weight_map = {
            plan.name: name for name, shard in zip(names, shards, strict=True) for plan in shard
        }
        index = {
            "metadata": {"total_size": sum(plan.num_bytes for plan in planned)},
            "weight_map": weight_map,
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(planned: Sequence[Planned], shard_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    for plan in planned:
        if shards[-1] and sum(p.num_bytes for p in shards[-1]) + plan.num_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(plan)
    return shards


def _header(shard: Sequence[Planned]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for plan in shard:
        end = place + plan.num_bytes
        entries[plan.name] = {
            "dtype": NAMES[plan.dtype],
            "shape": plan.shape,
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
