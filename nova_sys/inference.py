"""A checkpoint, ready to score or to generate: what `evaluate` and `generate` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nova_sys.checkpoint import load_weights, read_description, resolve_checkpoint
from nova_sys.config import RunConfig
from nova_sys.config_io import load_recipe
from nova_sys.data.tokenizer import Tokenizer, load_tokenizer
from nova_sys.model.build import build_model, transformer_config
from nova_sys.model.gpt import PackedGPT
from nova_sys.parallel import Parallel, choose_dtype

# A checkpoint remembers the layout it was trained on; it is scored on one rank unless the caller says otherwise.
ONE_RANK = (
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.virtual_pipeline=1",
    "parallel.sequence=false",
)


@dataclass(frozen=True)
class LoadedModel:
    """config: the run's, with overrides applied; chunks: this rank's part of the model, in eval mode."""

    checkpoint: Path
    config: RunConfig
    tokenizer: Tokenizer
    chunks: list[PackedGPT]


def checkpoint_config(
    checkpoint: str | Path, overrides: Sequence[str] = ()
) -> tuple[Path, RunConfig]:
    """The checkpoint folder and the configuration it was saved with, overridden."""
    folder = resolve_checkpoint(checkpoint)
    config = load_recipe(
        folder / "config.toml", [*ONE_RANK, f'data.tokenizer="{folder / "tokenizer"}"', *overrides]
    )
    return folder, config


def load_model(folder: Path, config: RunConfig, parallel: Parallel) -> LoadedModel:
    dtype = choose_dtype(config.train.precision, parallel.device)
    vocab_size = read_description(folder).vocab_size
    chunks = build_model(
        config.model,
        transformer_config(config.model, parallel, dtype=dtype),
        parallel,
        vocab_size=vocab_size,
        max_positions=config.data.pack_length,
        seed=config.train.seed,
    )
    load_weights(folder, chunks, config.model, vocab_size)
    for chunk in chunks:
        chunk.eval().requires_grad_(False)
    return LoadedModel(folder, config, load_tokenizer(folder / "tokenizer"), chunks)
