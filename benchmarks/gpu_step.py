"""A DPO step at the shapes of Llama 3 8B's layers: `python benchmarks/gpu_step.py --variant triton --out FILE.json`.

Random weights, and pairs of random words with hh-rlhf's lengths. One process per variant; the trainer is the product's, without checkpoints.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from nova_sys.config import RunConfig
from nova_sys.config_io import load_recipe
from nova_sys.data.tokenizer_training import train_sentencepiece
from nova_sys.parallel import parallel_run
from nova_sys.trainer import Trainer

RECIPE = Path(__file__).resolve().parents[1] / "launch" / "recipes" / "dpo_hh_small.toml"
LLAMA_8B_LAYERS = {
    "model.num_layers": 4,
    "model.hidden_size": 4096,
    "model.num_heads": 32,
    "model.num_kv_heads": 8,
    "model.ffn_hidden_size": 14336,
    "model.vocab_size": 128256,
    "data.pack_length": 8192,
    "data.max_length": 4096,
    "train.global_batch_packs": 2,
    "train.precision": "bf16",
    "optimizer.lr": 1e-6,
}
TINY = {
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
}
VARIANTS: dict[str, dict[str, Any]] = {
    "triton": {"train.kernels": "triton"},
    "reference": {"train.kernels": "reference"},
    "triton, nothing shared": {"train.kernels": "triton", "data.share_prefix": False},
    "triton, kv_shift": {"train.kernels": "triton", "model.kv_shift": True},
    "triton, selective recomputation": {
        "train.kernels": "triton",
        "train.recompute": "selective",
    },
}
CATEGORIES = {  # part of a kernel's name -> what it is counted to; the first match counts
    "fold_kernel": "output layer",
    "dlogits": "output layer",
    "sum_rows": "output layer",
    "attention": "attention",
    "flash": "attention",
    "rope": "rotary positions and KV shift",
    "gemm": "matrix products",
    "nvjet": "matrix products",
    "cutlass": "matrix products",
    "multi_tensor": "optimizer",
    "adam": "optimizer",
    "nccl": "communication",
    "Memcpy": "copies",
    "Memset": "copies",
}


def write_pairs(path: Path, count: int, longest: int) -> None:
    """Log-normal lengths, fitted to prefix plus two answers of hh-rlhf; three fifths of a pair are its prefix. A tokenizer beside it."""
    rng = np.random.default_rng(0)
    words = [f"{a}{b}{c}" for a in "bdfgkl" for b in "aeiou" for c in "mnprst"]
    lengths = np.clip(rng.lognormal(5.12, 0.73, count), 12, longest).astype(int)
    with path.open("w") as out:
        for length in lengths:
            chosen = rng.choice(words, length)
            parts = np.split(chosen, [length * 3 // 5, length * 4 // 5])
            prompt, good, bad = (" ".join(part) for part in parts)
            pair = {"prompt": prompt, "chosen": " " + good, "rejected": " " + bad}
            out.write(json.dumps(pair) + "\n")
    train_sentencepiece([" ".join(words)] * 50, 400, path.with_name("tokenizer.model"))


def recipe(work: Path, settings: dict[str, Any]) -> RunConfig:
    paths = {
        "data.train": f"{work}/pairs.jsonl",
        "data.tokenizer": f"{work}/tokenizer.model",
        "data.cache_dir": f"{work}/cache",
        "run.dir": f"{work}/run",
    }
    given = {**QUIET, **paths, **settings}
    return load_recipe(RECIPE, [f"{key}={json.dumps(value)}" for key, value in given.items()])


def train_steps(trainer: Trainer, first: int, count: int) -> list[dict[str, Any]]:
    """The records that the trainer itself would write."""
    records: list[dict[str, Any]] = []
    trainer.telemetry.step = lambda record, _: records.append(dict(record))
    for step in range(first, first + count):
        trainer._one_step(step)
    return records


def kernel_seconds(events: Any) -> dict[str, float]:
    """Seconds on the GPU by category."""
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = next((c for part, c in CATEGORIES.items() if part in event.key), "other")
            seconds[name] += event.self_device_time_total / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def slowest_kernels(events: Any, count: int = 25) -> dict[str, float]:
    on_gpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    on_gpu.sort(key=lambda e: -e.self_device_time_total)
    return {e.key[:120]: e.self_device_time_total / 1e6 for e in on_gpu[:count]}


def measure(trainer: Trainer, warm_up: int, steps: int) -> dict[str, Any]:
    trainer.loader.start(0)
    try:
        began_s = time.perf_counter()
        first = train_steps(trainer, 0, warm_up)
        warm_up_s = time.perf_counter() - began_s
        records = train_steps(trainer, warm_up, steps)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            train_steps(trainer, warm_up + steps, 1)
    finally:
        trainer.loader.stop()
    events = profiler.key_averages()
    keys = [k for k, v in records[0].items() if isinstance(v, int | float) and k != "step"]
    return {
        "first_loss": first[0]["loss"],
        "warm_up_s": warm_up_s,
        "median": {key: statistics.median(r[key] for r in records) for key in keys},
        "step_time_s": [record["step_time_s"] for record in records],
        "kernel_seconds_of_a_step": kernel_seconds(events),
        "slowest_kernels": slowest_kernels(events),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=VARIANTS, default="triton")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, help="else 4")
    parser.add_argument("--tiny", action="store_true", help="to test the code; also on a CPU")
    arguments = parser.parse_args()
    settings = {**(TINY if arguments.tiny else LLAMA_8B_LAYERS), **VARIANTS[arguments.variant]}
    if arguments.layers:
        settings["model.num_layers"] = arguments.layers
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_pairs(work / "pairs.jsonl", 40 if arguments.tiny else 2000, 1000)
        config = recipe(work, settings)
        began_s = time.perf_counter()
        with parallel_run(config.parallel, seed=config.train.seed) as parallel:
            trainer = Trainer(config, parallel)
            record = {"variant": arguments.variant, "settings": settings}
            record["setup_s"] = time.perf_counter() - began_s
            record |= measure(trainer, 1 if arguments.tiny else 3, arguments.steps)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["median"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
