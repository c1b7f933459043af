"""The tensors of a checkpoint of ours (torch's distributed format), one at a time, without a model and without a job.

A checkpoint of ours has one tensor for a weight of all layers, with the layer as first axis (one for each layer where these differ in
shape), in chunks that lie anywhere in its files.
"""

from __future__ import annotations

import io
import json
import pickle
from collections import defaultdict
from pathlib import Path
from typing import BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from nova_sys.checkpoint_files import (
    COMMON,
    METADATA,
    _PlainUnpickler,
    refuse_damaged,
    refuse_harmful,
)
from nova_sys.weight_names import numbered

SHARDS, FORMAT_FILE = "__0_0.distcp", "metadata.json"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""What Megatron wants to read of a folder first."""


class CheckpointReader:
    """Any rows of any weight. Raises: ValueError for a checkpoint that is damaged, or not harmless."""

    def __init__(self, folder: Path) -> None:
        refuse_damaged(folder)
        refuse_harmful(folder)
        with (folder / METADATA).open("rb") as file:
            metadata: Metadata = _PlainUnpickler(file).load()
        self._folder = folder
        self._tensors = metadata.state_dict_metadata
        self._cached: tuple[tuple[str, int | None], dict[tuple[str, int], torch.Tensor]] = (
            ("", None),
            {},
        )
        """The chunks of one weight: its rows are asked for head by head."""
        self._chunks: dict[str, list[tuple[tuple[int, ...], _StorageInfo]]] = defaultdict(list)
        for index, place in (metadata.storage_data or {}).items():
            self._chunks[index.fqn].append((tuple(index.offset or ()), place))

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def _meta(self, name: str) -> TensorStorageMetadata:
        tensor = self._tensors[name]
        assert isinstance(tensor, TensorStorageMetadata)  # refuse_harmful has seen to it
        return tensor

    def _place(self, name: str, layer: int | None) -> tuple[str, int | None]:
        """Where a layer's weight lies: in all layers' tensor, or, where layers differ, in its own."""
        if layer is not None and name not in self._tensors:
            return numbered(name, layer), None
        return name, layer

    def dtype(self, name: str, layer: int | None) -> torch.dtype:
        return self._meta(self._place(name, layer)[0]).properties.dtype

    def rows(self, name: str, layer: int | None, first: int, num_rows: int) -> torch.Tensor:
        """Rows of a weight, of one layer where layers have it; only the chunks that hold some of them are read. Not to be written to:
        it may be a view of a chunk that is kept."""
        name, layer = self._place(name, layer)
        shape = tuple(self._meta(name).size)
        lead = () if layer is None else (layer,)
        body = shape[len(lead) :]
        wanted = (num_rows, *body[1:])
        out = None
        found = 0
        if self._cached[0] != (name, layer):
            self._cached = ((name, layer), {})
        sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in self._meta(name).chunks}
        for offset, place in self._chunks[name]:
            at, size = offset[len(lead) :], sizes[offset][len(lead) :]
            start, stop = max(first, at[0]), min(first + num_rows, at[0] + size[0])
            if start >= stop or offset[: len(lead)] != lead:
                continue
            chunk = self._read(place).reshape(size)[start - at[0] : stop - at[0]]
            if chunk.shape == wanted:
                return chunk
            out = torch.empty(wanted, dtype=chunk.dtype) if out is None else out
            target = out[start - first : stop - first]
            if len(size) > 1:
                target = target[:, at[1] : at[1] + size[1]]
            target.copy_(chunk)
            found += chunk.numel()
        if out is None or found != out.numel():
            raise ValueError(
                f"{self._folder} is damaged: its {METADATA} does not tell where all of {name} lies. Restore it from a copy"
            )
        return out

    def _read(self, place: _StorageInfo) -> torch.Tensor:
        chunks = self._cached[1]
        key = (place.relative_path, place.offset)
        if key not in chunks:
            with (self._folder / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                content = io.BytesIO(file.read(place.length))
            chunks[key] = torch.load(content, map_location="cpu", weights_only=True)
        return chunks[key]


class CheckpointWriter:
    """The shards of a checkpoint, written one tensor after the other; `finish` makes a checkpoint's files of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = (folder / SHARDS).open("wb")
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._tensors: dict[str, TensorStorageMetadata] = {}

    def write(self, name: str, tensor: torch.Tensor, layer: int | None, num_layers: int) -> None:
        """A whole weight, or that of one layer."""
        lead = () if layer is None else (layer,)
        sizes = (*(1 for _ in lead), *tensor.shape)
        offsets = torch.Size((*lead, *(0 for _ in tensor.shape)))
        entry = self._tensors.setdefault(
            name,
            TensorStorageMetadata(
                properties=TensorProperties(dtype=tensor.dtype),
                size=torch.Size((*(num_layers for _ in lead), *tensor.shape)),
                chunks=[],
            ),
        )
        entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size(sizes)))
        start = self._file.tell()
        _save(tensor.detach().reshape(sizes).contiguous(), self._file)
        self._places[MetadataIndex(name, offsets)] = _StorageInfo(
            SHARDS, start, self._file.tell() - start
        )

    def finish(self) -> None:
        self._file.close()
        metadata = Metadata(dict(self._tensors), None, self._places, StorageMeta(str(self._folder)))
        (self._folder / METADATA).write_bytes(pickle.dumps(metadata))
        (self._folder / FORMAT_FILE).write_text(json.dumps(FORMAT))
        with (self._folder / COMMON).open("wb") as file:
            _save({}, file)

    def close(self) -> None:
        self._file.close()


def _save(value: object, file: BinaryIO) -> None:
    """torch.save, which hides what a full disk says behind an error of its own. Raises: OSError."""
    try:
        torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
