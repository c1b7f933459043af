"""A checkpoint, ready to score or to generate: what `evaluate` and `generate` share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nova_sys.checkpoint import load_weights
from nova_sys.checkpoint_files import read_description, resolve_checkpoint
from nova_sys.config import RunConfig
from nova_sys.config_io import load_recipe
from nova_sys.data.prepare import refuse_other_ids
from nova_sys.data.tokenizer import Tokenizer, load_tokenizer
from nova_sys.model.build import build_model, check_kernels, transformer_config
from nova_sys.model.gpt import PackedGPT
from nova_sys.parallel import Parallel, choose_dtype

# A checkpoint remembers the layout it was trained on; it is scored on one rank unless the caller says otherwise.
ONE_RANK = (
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.virtual_pipeline=1",
    "parallel.sequence=false",
)


def as_toml(value: str | list[str]) -> str:
    """The value of an override, whatever is in the text."""
    return json.dumps(value, ensure_ascii=False)


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
        folder / "config.toml",
        [*ONE_RANK, f"data.tokenizer={as_toml(str(folder / 'tokenizer'))}", *overrides],
    )
    return folder, config


def refuse_other_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Raises: ValueError when the weights in `folder` do not know the ids that this tokenizer gives."""
    refuse_other_ids(tokenizer, folder / "tokenizer", "of the pairs")
    num_rows = read_description(folder).vocab_size
    if tokenizer.vocab_size > num_rows:
        raise ValueError(
            f"the tokenizer of the pairs has {tokenizer.vocab_size} ids, and the weights in {folder} rows for {num_rows}; each id "
            "needs one. Leave data.tokenizer out"
        )


def load_model(folder: Path, config: RunConfig, parallel: Parallel) -> LoadedModel:
    dtype = choose_dtype(config.train.precision, parallel.device)
    check_kernels(config.train.kernels, parallel.device)
    vocab_size = read_description(folder).vocab_size
    chunks = build_model(
        config.model,
        transformer_config(config.model, parallel, dtype=dtype),
        parallel,
        vocab_size=vocab_size,
        max_positions=config.data.pack_length,
        seed=config.train.seed,
        backend=config.train.kernels,
    )
    load_weights(folder, chunks, config.model, vocab_size)
    for chunk in chunks:
        chunk.eval().requires_grad_(False)
    return LoadedModel(folder, config, load_tokenizer(folder / "tokenizer"), chunks)
