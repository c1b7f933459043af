"""Weights between a Hugging Face folder and ours, tensor by tensor: the tables of families.py at work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nova_sys.config import ModelConfig
from nova_sys.hf.config_json import is_hf_folder, refuse_other_model
from nova_sys.hf.families import Row, blocks_of, shape_of
from nova_sys.hf.folder import HFFolder, flat_shape

ReadRows = Callable[[str, int | None, int, int], torch.Tensor]
"""(name of ours, layer, first row, number of rows) -> those rows."""


def load_any_weights(
    source: Path, chunks: Sequence[Any], model: ModelConfig, vocab_size: int
) -> None:
    """Loads the weights of a checkpoint of ours or of a Hugging Face folder, on any layout. Called on every rank.

    Of a Hugging Face folder each rank reads the slices that it holds. KV-shift scalars that it lacks stay as initialised.
    Raises: ValueError when it holds another model.
    """
    from nova_sys.checkpoint import load_weights

    if not is_hf_folder(source):
        load_weights(source, chunks, model, vocab_size)
        return
    folder = HFFolder(source)
    refuse_other_model(model, vocab_size, folder.path, folder.model)
    fill_chunks(folder, chunks)


@torch.no_grad()
def fill_chunks(folder: HFFolder, chunks: Sequence[Any]) -> None:
    """Fills this rank's parameters, and no more is read than they hold. Padding of the vocabulary becomes zeros."""
    from nova_sys.model.build import layer_of, shards_of

    in_table = {row.ours for row in folder.rows}
    for shard in (shard for chunk in chunks for shard in shards_of(chunk)):
        assert shard.data is not None
        ours, layer = layer_of(shard)
        if ours not in in_table:
            assert ours.endswith("mix_K2"), ours  # KV shifting, added to such a model
            continue
        offsets = shard.global_offset[shard.prepend_axis_num :]
        columns = None
        if len(offsets) == 2:
            columns = slice(offsets[1], offsets[1] + shard.data.shape[1])
        fill_rows(folder, ours, layer, offsets[0], shard.data, columns=columns)


def fill_rows(
    folder: HFFolder,
    ours: str,
    layer: int | None,
    first: int,
    out: torch.Tensor,
    *,
    columns: slice | None = None,
) -> None:
    """Rows first .. first + len(out) of a tensor of ours, from slices of the folder's; 0 where it has none."""
    out.zero_()
    end = first + out.shape[0]
    for row in (row for row in folder.rows if row.ours == ours):
        name = row.in_layer(layer)
        for block in blocks_of(row, folder.dims(layer)):
            start, stop = max(first, block.ours), min(end, block.ours + block.num_rows)
            if start < stop:
                theirs = block.theirs + start - block.ours
                wanted = slice(theirs, theirs + stop - start)
                out[start - first : stop - first] = folder.slice(name, wanted, columns)


def their_tensor(
    row: Row, layer: int | None, dims: dict[str, int], dtype: torch.dtype, read: ReadRows
) -> torch.Tensor:
    """A whole tensor of a Hugging Face folder, from rows of ours."""
    shape, blocks = shape_of(row.shape, dims), list(blocks_of(row, dims))
    if len(blocks) == 1:  # most of them, and the largest
        return read(row.ours, layer, blocks[0].ours, blocks[0].num_rows).to(dtype).reshape(shape)
    out = torch.empty(flat_shape(shape), dtype=dtype)
    for block in blocks:
        out[block.theirs : block.theirs + block.num_rows] = read(
            row.ours, layer, block.ours, block.num_rows
        )
    return out.reshape(shape)
