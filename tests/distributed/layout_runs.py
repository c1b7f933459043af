"""Runs one small recipe on several layouts inside already started ranks; imported by the layout tests' workers.

Every layout starts from the same seed (initial weights do not depend on the layout), so metrics, the first step's gradients and
the final weights must agree with the single-rank run to rounding.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

BROKEN = "no tensor reduction"
Whole = dict[str, np.ndarray]
"""A value per parameter element: weights or gradients of the whole model, by Megatron's global names."""


def small_recipe(data: Path, out: Path, overrides: dict[str, Any]) -> Any:
    from nova_sys.config_io import load_recipe

    tokenizer = data.with_name("tokenizer")
    settings: dict[str, Any] = {
        "run.dir": str(out),
        "data.train": str(data),
        "data.tokenizer": str(tokenizer) if tokenizer.exists() else "",
        "data.cache_dir": str(out.with_name("cache")),
        "data.pack_length": 256,
        "data.max_length": 256,
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
        # Adam divides by the gradient's own size: with its usual 1e-8, rounding of a gradient that is nearly zero would move a weight
        # by as much as the learning rate, and final weights could not be compared
        "optimizer.eps": 1e-3,
        "log.tensorboard": False,
        "log.progress": False,
        **overrides,
    }
    recipe = Path(__file__).with_name("layout.toml")
    return load_recipe(recipe, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def run_layout(
    data: str, out: str, overrides: dict[str, Any], changes: tuple[str, ...] = ()
) -> dict[str, Any] | None:
    """Trains and returns, on rank 0, the metric records, the first step's gradients and the final weights; None on other ranks.

    A run that stops with a RuntimeError gives {"error": its text}. Nothing is saved.
    """
    from nova_sys import metrics
    from nova_sys.parallel import parallel_run
    from nova_sys.trainer import Trainer

    config = small_recipe(Path(data), Path(out), overrides)
    with ExitStack() as stack:
        # else a GEMM is timed for every case
        stack.enter_context(mock.patch.object(metrics, "peak_flops", lambda *_: 1e12))
        for change in changes:
            stack.enter_context(CHANGES[change]())
        parallel = stack.enter_context(parallel_run(config.parallel, seed=config.train.seed))
        trainer = Trainer(config, parallel)
        gradients = [] if BROKEN in changes else keep_first_gradients(trainer)
        attention_calls = count_attention_calls(trainer)
        trainer.save = lambda *_, **__: None  # nobody looks at it, and it takes half the time
        try:
            trainer.train()
        except RuntimeError as error:
            return {"error": str(error)}
        weights = whole_model(trainer, parallel)
        if not parallel.is_main:
            return None
    records = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    found = {"records": records, "gradients": gradients[0], "weights": weights}
    return found | {"attention_calls": sum(attention_calls)}


def run_layouts(
    rank: int, data: str, cases: list[tuple[str, dict[str, Any], tuple[str, ...]]]
) -> list[dict[str, Any] | None]:
    """`run_ranks` worker: every case in turn, in the same processes. The first of all trains the tokenizer of all."""
    torch.set_num_threads(1)
    found = []
    for out, overrides, changes in cases:
        found.append(run_layout(data, out, overrides, changes))
        if not Path(data).with_name("tokenizer").exists():
            shutil.copytree(Path(out) / "tokenizer", Path(data).with_name("tokenizer"))
    return found


def count_attention_calls(trainer: Any) -> list[int]:
    """A list that grows with every forward pass of a layer's attention on this rank: recomputation must show in it."""
    calls: list[int] = []
    for layer in (layer for chunk in trainer.chunks for layer in chunk.decoder.layers):
        attention = layer.self_attention.core_attention
        attention.register_forward_hook(lambda *_: calls.append(1))
    return calls


# -- what a rank holds, put together -------------------------------------------------------------------------------------


def keep_first_gradients(trainer: Any) -> list[Whole]:
    """A list that the first optimizer step fills with the whole model's gradients, before clipping."""
    kept: list[Whole] = []
    step = trainer.optimizer.step

    def first_step(*args: Any, **kwargs: Any) -> Any:
        if not kept:
            kept.append(whole_gradients(trainer))
        return step(*args, **kwargs)

    trainer.optimizer.step = first_step
    return kept


@torch.no_grad()
def whole_gradients(trainer: Any) -> Whole:
    """Puts the gradients in the place of the weights for a moment, so that both are gathered alike."""
    parallel = trainer.parallel
    if trainer.config.parallel.distributed_optimizer:
        for buffer in (buffer for chunk in trainer.ddp for buffer in chunk.buffers):
            for bucket in buffer.buckets:
                group = parallel.groups.dp_cp
                shards = list(bucket.grad_data.chunk(group.size()))
                dist.all_gather(shards, shards[group.rank()].clone(), group=group)  # now the sum
    parameters = [parameter for chunk in trainer.chunks for parameter in chunk.parameters()]
    weights = [parameter.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.copy_(parameter.main_grad)
    gradients = whole_model(trainer, parallel)
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.copy_(weight)
    return gradients


def whole_model(trainer: Any, parallel: Any) -> Whole:
    """The whole model's parameters, on every rank. Asserts that every part was seen, and that replicas are equal bit for bit."""
    from nova_sys.model.build import shards_of

    pieces = []
    for shard in (shard for chunk in trainer.chunks for shard in shards_of(chunk)):
        assert shard.data is not None
        axes = shard.prepend_axis_num  # 1 for a weight of one of several layers
        key = f"{shard.key}@{shard.global_offset[:axes]}"
        values = (
            shard.data.detach().clone().numpy()
            if shard.data.dtype != torch.bfloat16
            else shard.data.detach().float().numpy()
        )
        pieces.append((key, shard.global_shape[axes:], shard.global_offset[axes:], values))
    gathered: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(gathered, pieces)  # now every rank has every rank's parts
    whole: Whole = {}
    for key, shape, offset, values in (piece for rank in gathered for piece in rank):
        array = whole.setdefault(key, np.full(shape, np.nan, dtype=values.dtype))
        part = array[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))]
        assert np.isnan(part).all() or np.array_equal(part, values), f"{key}: replicas differ"
        part[...] = values
    for key, array in whole.items():
        assert not np.isnan(array).any(), f"{key}: not every part of this parameter was seen"
    return whole


# -- changes to the program that a case may ask for ------------------------------------------------------------------------


@contextmanager
def in_fp64() -> Iterator[None]:
    """Weights, activations and gradients in fp64. For one step with the plain optimizer, whose state is not looked at."""
    from nova_sys import optimizer, trainer

    ddp_config = optimizer.DistributedDataParallelConfig

    def wide(**settings: Any) -> Any:
        return ddp_config(**{**settings, "grad_reduce_in_fp32": False})

    with (
        mock.patch.object(trainer, "choose_dtype", lambda *_: torch.float64),
        mock.patch.object(optimizer, "DistributedDataParallelConfig", wide),
    ):
        yield


@contextmanager
def without_tensor_reduction() -> Iterator[None]:
    """Row-parallel layers forget to sum over the tensor-parallel ranks: the fault that the first loss must reveal."""
    from megatron.core.tensor_parallel import mappings

    with mock.patch.object(mappings, "_reduce", lambda tensor, group: tensor):
        yield


CHANGES = {"fp64": in_fp64, BROKEN: without_tensor_reduction}
