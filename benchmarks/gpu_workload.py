"""What gpu_step.py and gpu_trl.py train on: a model of Llama 3 8B's layers with random weights, and pairs of random tokens of chosen lengths."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from nova_sys.config import ModelConfig, RunConfig
from nova_sys.config_io import load_recipe

RECIPE = Path(__file__).resolve().parents[1] / "launch" / "recipes" / "dpo_hh_small.toml"
LLAMA_8B_LAYERS: dict[str, Any] = {
    "model.hidden_size": 4096,
    "model.num_heads": 32,
    "model.num_kv_heads": 8,
    "model.ffn_hidden_size": 14336,
    "model.vocab_size": 128256,
    "model.rope_base": 500000.0,
    "data.pack_length": 8192,
    "data.max_length": 4096,
    "train.global_batch_packs": 2,
    "train.precision": "bf16",
    "optimizer.lr": 1e-6,
}
TINY: dict[str, Any] = {
    "model.num_layers": 1,
    "model.hidden_size": 128,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.ffn_hidden_size": 64,
    "model.vocab_size": 1024,
    "data.pack_length": 512,
    "data.max_length": 256,
    "train.global_batch_packs": 1,
    "train.precision": "fp32",
}
QUIET = {
    "log.tensorboard": False,
    "log.progress": False,
    "log.every_steps": 1_000_000,
    "train.steps": 1_000_000,
    "checkpoint.every_steps": 0,
    "optimizer.warmup_steps": 0,
}


@dataclass(frozen=True)
class Lengths:
    """Tokens of a document: its prefix (three fifths) and two answers (a fifth each). Log-normal, then cut to the bounds."""

    mean: float
    sigma: float
    least: int
    most: int
    pairs: int

    def draw(self) -> np.ndarray:
        drawn = np.random.default_rng(0).lognormal(self.mean, self.sigma, self.pairs)
        return np.clip(drawn, self.least, self.most).astype(int)


DATA = {
    "hh": Lengths(5.12, 0.73, 12, 2000, 600),
    "long": Lengths(8.0, 0.5, 1000, 5000, 40),
}
"""hh: fitted to prefix plus two answers of hh-rlhf. long: 5000 is what fits a pack of 8192 with two copies of the prefix."""
TINY_DATA = {"hh": Lengths(3.5, 0.7, 12, 100, 40), "long": Lengths(5.0, 0.5, 60, 300, 12)}


def write_pairs(folder: Path, lengths: Lengths, vocab_size: int) -> None:
    """pairs.jsonl, and a tokenizer for which `w7` is token 7: a document has exactly the length drawn, and an end for each answer."""
    words = {f"w{i}": i for i in range(vocab_size)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    (folder / "tokenizer").mkdir(parents=True)
    inner.save(str(folder / "tokenizer" / "tokenizer.json"))
    about = {"eos_token": "w0", "unk_token": "w0", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(about))
    rng = np.random.default_rng(1)
    with (folder / "pairs.jsonl").open("w") as out:
        for length in lengths.draw():
            tokens = [f"w{i}" for i in rng.integers(1, vocab_size, length - 2)]
            parts = np.split(np.array(tokens), [length * 3 // 5, length * 4 // 5 - 1])
            prompt, chosen, rejected = (" ".join(part) for part in parts)
            pair = {"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected}
            out.write(json.dumps(pair) + "\n")


def recipe(work: Path, settings: dict[str, Any]) -> RunConfig:
    paths = {
        "data.train": f"{work}/pairs.jsonl",
        "data.tokenizer": f"{work}/tokenizer",
        "data.cache_dir": f"{work}/cache",
        "run.dir": f"{work}/run",
    }
    given = {**QUIET, **paths, **settings}
    given.setdefault("optimizer.min_lr", given.get("optimizer.lr", 1e-4))
    return load_recipe(RECIPE, [f"{key}={json.dumps(value)}" for key, value in given.items()])


BYTES_PER_PARAMETER = 18
"""bf16 weight 2, fp32 gradient 4, fp32 master weight 4, two fp32 moments 8."""
RESERVED_BYTES = 10 << 30
"""Gradient of the output weight in fp32, workspaces, CUDA's context, what the allocator cannot use."""


def memory_of(settings: dict[str, Any]) -> tuple[int, int]:
    """Bytes that do not depend on the number of layers, and bytes of a layer: parameters with optimizer state, and kept activations.

    Kept per token and layer: six of the hidden size (residuals, norms, projections), q, k and v before and after the rotation, the
    attention's output, and four of the feed-forward size (both halves, silu, their product).
    """
    D, F, V = (settings[f"model.{k}"] for k in ("hidden_size", "ffn_hidden_size", "vocab_size"))
    N, K = settings["model.num_heads"], settings["model.num_kv_heads"]
    H, T = D // N, settings["data.pack_length"]
    parameters = D * H * (2 * N + 2 * K) + 3 * D * F + 2 * D
    activations = 2 * T * (6 * D + 2 * (N + 2 * K) * H + N * H + 4 * F)
    return BYTES_PER_PARAMETER * 2 * V * D, BYTES_PER_PARAMETER * parameters + activations


def layers_that_fit(free_bytes: int, settings: dict[str, Any]) -> dict[str, Any]:
    """At least 4, at most the model's 32, and by what they were chosen."""
    fixed, per_layer = memory_of(settings)
    fit = (free_bytes - RESERVED_BYTES - fixed) // per_layer
    return {
        "layers": max(4, min(32, fit)),
        "free_gib": free_bytes / 2**30,
        "reserved_gib": RESERVED_BYTES / 2**30,
        "fixed_gib": fixed / 2**30,
        "gib_per_layer": per_layer / 2**30,
    }


@torch.no_grad()
def quick_weights(chunks: Sequence[torch.nn.Module], model: ModelConfig, seed: int) -> None:
    """The distributions of nova_sys's initialisation, drawn on the device: there, billions of values take seconds instead of minutes."""
    for chunk in chunks:
        device = next(chunk.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        for name, weight in chunk.named_parameters():
            if "mix_K2" in name:
                weight.copy_(torch.tensor([0.0, 1.0]))
            elif "norm" in name:
                weight.fill_(1.0)
            else:
                into_residual = "linear_proj" in name or "linear_fc2" in name
                std = model.init_std / (math.sqrt(2 * model.num_layers) if into_residual else 1.0)
                drawn = torch.empty(weight.shape, device=device, dtype=torch.bfloat16)
                weight.copy_(drawn.normal_(0.0, std, generator=generator))
