"""`nova convert`: a Hugging Face folder to a checkpoint of ours, and back. On the CPU, in one process, one tensor at a time.

What is written appears whole or not at all, and never where something is.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from nova_sys.checkpoint_files import (
    DESCRIPTION,
    Description,
    describe_model,
    file_sizes,
    read_description,
    sync_to_disk,
)
from nova_sys.config import RunConfig
from nova_sys.config_io import to_toml
from nova_sys.config_rules import broken_rules
from nova_sys.data.render import Renderer
from nova_sys.data.tokenizer import Tokenizer, load_tokenizer
from nova_sys.hf.carried import (
    GENERATION,
    carried_config,
    carried_generation,
    carried_texts,
    exported_texts,
    more_stop_ids,
)
from nova_sys.hf.config_json import CONFIG, is_hf_folder
from nova_sys.hf.config_out import family_for, write_config
from nova_sys.hf.dist_files import CheckpointReader, CheckpointWriter
from nova_sys.hf.export_tokenizer import make_loadable
from nova_sys.hf.families import Row, dims_of, our_shape, shape_of, table_of
from nova_sys.hf.folder import HFFolder
from nova_sys.hf.safetensors_writer import Planned, write_sharded
from nova_sys.hf.weights import fill_rows, their_tensor
from nova_sys.saved_config import checkpoint_config
from nova_sys.weight_names import numbered

logger = logging.getLogger(__name__)

Dtype = Literal["keep", "fp32", "bf16", "fp16"]
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def from_hf(source: Path, out: Path, *, dtype: Dtype = "keep") -> None:
    """Writes a checkpoint of ours at step 0: weights, tokenizer and template of the folder, no optimizer state.

    Raises: ValueError when the folder is no such model, or `out` exists, or the disk refuses.
    """
    if not is_hf_folder(source):
        raise ValueError(f"{source} has no {CONFIG}: give a Hugging Face folder")
    folder = HFFolder(source)
    tokenizer = load_tokenizer(source)
    if tokenizer.vocab_size > folder.model.vocab_size:
        raise ValueError(
            f"{source}: its tokenizer has {tokenizer.vocab_size} ids, its {CONFIG} rows for {folder.model.vocab_size}; every id needs "
            "a row. Correct the folder"
        )
    config = RunConfig(model=folder.model)
    if broken := [rule for rule in broken_rules(config, 1) if rule.startswith("model.")]:
        raise ValueError("\n  ".join([f"{source / CONFIG} breaks rules of [model]:", *broken]))
    with _whole_folder(out) as partial:
        writer = CheckpointWriter(partial)
        try:
            for ours, layer in _our_tensors(folder):
                tensor = _ours(folder, ours, layer, dtype)
                if layer is not None and folder.model.layers_differ:
                    writer.write(numbered(ours, layer), tensor, None, 0)
                else:
                    writer.write(ours, tensor, layer, folder.model.num_layers)
            writer.finish()
        finally:
            writer.close()
        (partial / "config.toml").write_text(to_toml(config))
        tokenizer.save(partial / "tokenizer")
        for name, text in carried_texts(source).items():
            (partial / name).write_text(text, encoding="utf-8")
        described = Description(
            step=0,
            model=describe_model(folder.model),
            vocab_size=folder.model.vocab_size,
            run={},
            data_key="",
            start_identity="",
            world_size=1,
            device="cpu",
            identity=uuid.uuid4().hex,
            files=file_sizes(partial),
        )
        (partial / DESCRIPTION).write_text(json.dumps(asdict(described), indent=1))


def _our_tensors(folder: HFFolder) -> Iterator[tuple[str, int | None]]:
    """(name, layer) of every tensor of ours."""
    for ours in dict.fromkeys(row.ours for row in folder.rows if not row.in_layers):
        yield ours, None
    for layer in range(folder.model.num_layers):
        for ours in dict.fromkeys(row.ours for row in folder.rows if row.in_layers):
            yield ours, layer


def _ours(folder: HFFolder, ours: str, layer: int | None, dtype: Dtype) -> torch.Tensor:
    kept = folder.dtype_of(ours)
    shape = our_shape(ours, folder.dims(layer), padded=True)
    out = torch.empty(shape, dtype=TORCH_DTYPES.get(dtype, kept))
    fill_rows(folder, ours, layer, 0, out)
    return _finite(out, f"{ours} of layer {layer}")


def _finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Raises: ValueError when the tensor holds no numbers; in fp16 the largest is 65504."""
    if not tensor.isfinite().all():
        raise ValueError(
            f"{name} is not finite in {str(tensor.dtype).removeprefix('torch.')}: the weights are damaged, or exceed its range; use a "
            "checkpoint that is whole, or --dtype bf16"
        )
    return tensor


def to_hf(
    checkpoint: Path, out: Path, *, dtype: Dtype = "keep", shard_bytes: int = 5 * 10**9
) -> None:
    """Writes a folder that transformers loads: safetensors of at most `shard_bytes` each, config.json, tokenizer and template.

    Memory: about three times the largest tensor (the file's bytes, the tensor, the look at whether it is finite), whatever the model's size.
    Raises: ValueError when no architecture computes this model, or `out` exists, or the disk refuses.
    """
    if is_hf_folder(checkpoint):
        raise ValueError(
            f"{checkpoint} is a Hugging Face folder already; give a checkpoint or a run folder"
        )
    checkpoint, saved = checkpoint_config(checkpoint)
    reader, vocab_size = CheckpointReader(checkpoint), read_description(checkpoint).vocab_size
    model, like = saved.model, carried_config(checkpoint)
    family = family_for(model, like)
    planned = []
    for row in table_of(family, model):
        for layer in range(model.num_layers) if row.in_layers else [None]:
            kept = TORCH_DTYPES.get(dtype) or reader.dtype(row.ours, layer)
            shape = shape_of(row.shape, dims_of(model, vocab_size, layer))
            planned.append((Planned(row.in_layer(layer), kept, shape), row, layer))

    def tensor(row: Row, layer: int | None, kept: torch.dtype) -> torch.Tensor:
        dims = dims_of(model, vocab_size, layer)
        return _finite(their_tensor(row, layer, dims, kept, reader.rows), row.in_layer(layer))

    names = [plan.dtype for plan, _, _ in planned]
    main_dtype = str(max(set(names), key=names.count)).removeprefix("torch.")
    with _whole_folder(out) as partial:
        write_sharded(
            partial,
            [plan for plan, _, _ in planned],
            (tensor(row, layer, plan.dtype) for plan, row, layer in planned),
            shard_bytes=shard_bytes,
        )
        config = write_config(model, vocab_size, family, main_dtype, like=like)
        tokenizer = load_tokenizer(checkpoint / "tokenizer")
        defaults = {  # transformers' own would be those of Llama 2
            "max_position_embeddings": saved.data.pack_length,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
        }
        tokenizer.save(partial)
        make_loadable(partial)
        if family.own_code and "auto_map" not in config:
            logger.warning(
                "transformers has no %s by itself, and the model did not come with code: add the code files of a folder of that "
                "architecture, and the auto_map of its config.json",
                family.architecture,
            )
        config |= {name: value for name, value in defaults.items() if name not in config}
        texts = {CONFIG: _json(config), **exported_texts(checkpoint)}
        texts |= _template_texts(checkpoint, saved.data.template, tokenizer)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")


def _json(table: dict[str, Any]) -> str:
    return json.dumps(table, indent=2) + "\n"


def _template_texts(checkpoint: Path, setting: str, tokenizer: Tokenizer) -> dict[str, str]:
    """The template that the model was trained with, where that is not the tokenizer's own, and what ends its answers: transformers
    stops nowhere else."""
    told, carried = more_stop_ids(checkpoint), carried_generation(checkpoint)
    if setting == "auto" and tokenizer.chat_template is not None and told:
        return {}  # all as in the folder that the model came with
    renderer, texts = Renderer(tokenizer, setting, "pairs"), {}
    stops = renderer.stop_ids() | told
    if stops != told:
        first = {"bos_token_id": tokenizer.bos_id}
        texts[GENERATION] = _json(first | carried | {"eos_token_id": sorted(stops)})
    template = renderer.choice.template
    if template is not None and template.text != tokenizer.chat_template:
        # BOS is ours to write before a built-in one; whoever applies it there gets it from the template
        adds_bos = template.is_built_in and tokenizer.bos_id is not None
        texts["chat_template.jinja"] = ("{{- bos_token }}" if adds_bos else "") + template.text
    return texts


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A new folder that gets its name when everything in it is on the disk. Raises: ValueError when `out` exists."""
    if os.path.lexists(out):  # false, not an error, for a name that no disk takes
        raise ValueError(f"{out} exists already, and nothing is written over it; name a new folder")
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        yield partial
        sync_to_disk(partial)
        partial.rename(out)
    except OSError as error:
        raise ValueError(
            f"{out} cannot be written ({error}); make room, or name a folder elsewhere"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
