"""Runs one small recipe on several layouts inside already started ranks; imported by the layout tests' workers.

Every layout starts from the same seed (initial weights do not depend on the layout), so losses, gradient norms and final
weights must agree with the single-rank run to fp32 rounding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch


def small_recipe(data: Path, out: Path, overrides: dict[str, Any]) -> Any:
    from nova_sys.config_io import load_recipe

    settings: dict[str, Any] = {
        "run.dir": str(out),
        "data.train": str(data),
        "data.cache_dir": str(out / "cache"),
        "data.pack_length": 256,
        "model.num_layers": 4,
        "model.hidden_size": 64,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.ffn_hidden_size": 96,
        "model.vocab_size": 300,
        "train.steps": 5,
        "train.global_batch_packs": 4,
        "train.seed": 7,
        "optimizer.lr": 3e-3,
        "log.tensorboard": False,
        "log.progress": False,
        "checkpoint.asynchronous": False,
        **overrides,
    }
    recipe = Path(__file__).with_name("layout.toml")
    return load_recipe(recipe, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def run_layout(data: str, out: str, overrides: dict[str, Any]) -> dict[str, Any] | None:
    """Trains and returns, on rank 0, the metric records and the assembled final weights; None on other ranks."""
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    from nova_sys.model.build import shards_of
    from nova_sys.parallel import parallel_run
    from nova_sys.trainer import Trainer

    config = small_recipe(Path(data), Path(out), overrides)
    with parallel_run(config.parallel, seed=config.train.seed) as parallel:
        trainer = Trainer(config, parallel)
        trainer.train()
        pieces = [
            (f"{s.key}@{s.global_offset[: s.prepend_axis_num]}", s.global_shape[s.prepend_axis_num :],
             s.global_offset[s.prepend_axis_num :], s.data.detach().clone().numpy())
            for chunk in trainer.chunks
            for s in shards_of(chunk)
            if is_main_replica(s.replica_id)
        ]  # fmt: skip
        gathered: list[Any] = [None] * parallel.world_size
        dist.all_gather_object(gathered, pieces)
        if not parallel.is_main:
            return None
    weights: dict[str, np.ndarray] = {}
    for key, shape, offset, values in (piece for rank in gathered for piece in rank):
        whole = weights.setdefault(key, np.full(shape, np.nan, dtype=values.dtype))
        whole[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))] = values
    records = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return {"records": records, "weights": weights}


def run_layouts(
    rank: int, data: str, cases: list[tuple[str, dict[str, Any]]]
) -> list[dict[str, Any] | None]:
    """`run_ranks` worker: every case in turn, in the same processes."""
    torch.set_num_threads(1)
    return [run_layout(data, out, overrides) for out, overrides in cases]
