"""A checkpoint, ready to score or to generate: what `evaluate` and `generate` share."""

from __future__ import annotations

from pathlib import Path

from nova_sys.config import RunConfig
from nova_sys.hf.weights import load_any_weights
from nova_sys.model.build import build_model, check_kernels, transformer_config
from nova_sys.model.gpt import PackedGPT
from nova_sys.parallel import Parallel, choose_dtype
from nova_sys.saved_config import rows_of_vocabulary


def load_model(folder: Path, config: RunConfig, parallel: Parallel) -> list[PackedGPT]:
    """This rank's part of the model of a checkpoint or a Hugging Face folder, in eval mode."""
    dtype = choose_dtype(config.train.precision, parallel.device)
    check_kernels(config.train.kernels, parallel.device)
    vocab_size = rows_of_vocabulary(folder, config)
    chunks = build_model(
        config.model,
        transformer_config(config.model, parallel, dtype=dtype),
        parallel,
        vocab_size=vocab_size,
        max_positions=config.data.pack_length,
        seed=config.train.seed,
        backend=config.train.kernels,
    )
    load_any_weights(folder, chunks, config.model, vocab_size)
    for chunk in chunks:
        chunk.eval().requires_grad_(False)
    return chunks
