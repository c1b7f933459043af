"""Megatron's optimizer (AdamW, optionally distributed) and its learning-rate schedule, from our config."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import optimizer as mcore_optimizer
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config

from nova_sys.config import OptimizerConfig
from nova_sys.model.te import BY_ITSELF, accumulate_in_place
from nova_sys.parallel import Parallel
from nova_sys.profiling import MegatronRanges

logger = logging.getLogger(__name__)

BACKENDS = {"transformer_engine": "Transformer Engine", "apex": "NVIDIA apex", "torch": "torch"}
HYPERPARAMETERS = ("max_lr", "min_lr", "lr_mult", "wd_mult", "betas", "eps")


def wrap_for_training(
    chunks: Sequence[Any],
    config: TransformerConfig,
    parallel: Parallel,
    *,
    distributed_optimizer: bool,
) -> list[DistributedDataParallel]:
    """Gives every chunk its gradient buffers (fp32) and its reduction over the data-parallel ranks."""
    overlap = parallel.data_size * parallel.context_size > 1
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        fp8_param_gather=config.fp8_param,
        overlap_grad_reduce=overlap,
        average_in_collective=False,  # sums here, one division by the global count in finalize_model_grads
        check_for_nan_in_grad=False,  # step.py looks once, on all ranks together, and says where
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.timers = MegatronRanges()
    ddp = [
        DistributedDataParallel(
            config=config,
            ddp_config=ddp_config,
            module=chunk,
            disable_bucketing=index > 0,
            pg_collection=parallel.groups,
        )
        for index, chunk in enumerate(chunks)
    ]
    if overlap:  # the backward pass of the last micro-batch sends every bucket of gradients as soon as it is whole
        no_syncs: Any = [chunk.no_sync for chunk in ddp]
        config.no_sync_func = no_syncs if len(ddp) > 1 else no_syncs[0]
    accumulates = accumulate_in_place(ddp) if parallel.device.type == "cuda" else BY_ITSELF
    logger.info("%s", _describe_backends(config, accumulates))
    return ddp


def _describe_backends(config: TransformerConfig, accumulates: str) -> str:
    """One line on Megatron's optional packages: what each part of a step runs on. Megatron takes Transformer Engine's Adam before apex's."""
    adam = BACKENDS[mcore_optimizer.Adam.__module__.partition(".")[0]]
    linear, norm = "Megatron's", "norm and attention"
    if config.fp8:
        first, last = config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16
        linear = f"Transformer Engine's with their norms, FP8 {config.fp8_recipe}"
        norm = "attention"
        if first or last:
            linear += f" but in the first {first} and last {last} layers"
    return f"linear layers: {linear}; weight gradients added by {accumulates}; Adam and gradient clipping: {adam}; {norm}: our own"


def build_optimizer(
    chunks: Sequence[DistributedDataParallel],
    config: OptimizerConfig,
    *,
    dtype: torch.dtype,
    distributed: bool,
) -> Any:
    """AdamW over fp32 master weights. Norms, biases and the KV-shift scalars are not decayed."""
    model = get_model_config(chunks[0])
    options = McoreOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        clip_grad=config.grad_clip,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        fp8_recipe=model.fp8_recipe if model.fp8 else None,
        use_distributed_optimizer=distributed,
        timers=MegatronRanges(),
    )
    overrides = get_standard_config_overrides(options)
    overrides[ParamKey(name=("*.k_mix_K2", "*.v_mix_K2"))] = {"wd_mult": 0.0}  # pyright: ignore[reportArgumentType]
    optimizer = get_megatron_optimizer(options, list(chunks), config_overrides=overrides)
    allocate_state(optimizer)
    return optimizer


def build_schedule(
    optimizer: Any, config: OptimizerConfig, *, total_steps: int
) -> OptimizerParamScheduler:
    """Linear warm-up from lr / (warmup + 1), so that the first step already moves, then cosine decay to min_lr."""
    warmup = config.warmup_steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr / (warmup + 1) if warmup else 0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(total_steps, warmup + 1),
        lr_decay_style="cosine",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
    )


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Loads a checkpoint's optimizer state, with torch's AdamW put right.

    Megatron's reader was written for fused Adams, whose step count lies in the parameter group. torch keeps one per weight: the
    reader (0.16.1) does not find it among the loaded tensors, and gives all weights the same tensor, which would then be
    incremented once per weight and step.
    """
    for part in _torch_parts(optimizer):
        if hasattr(part, "_set_main_param_and_optimizer_states"):
            part._set_main_param_and_optimizer_states = partial(_set_with_step, part)
    ours = [
        {k: group[k] for k in HYPERPARAMETERS if k in group} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, ours, strict=True):
        group.update(
            settings
        )  # the run's configuration decides, not what an earlier part of it was started with
    for part in _torch_parts(optimizer):
        for values in part.optimizer.state.values():
            values["step"] = values["step"].clone()


def _set_with_step(part: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    group, order = part.model_param_group_index_map[model_param]
    main_param = part.optimizer.param_groups[group]["params"][order]
    step = part.optimizer.state[main_param]["step"]  # already loaded, from the parameter group
    type(part)._set_main_param_and_optimizer_states(part, model_param, {"step": step, **tensors})


def allocate_state(optimizer: Any) -> None:
    """Gives torch's AdamW its state before the first step: Megatron's checkpoint reader and writer expect to find it, and every
    step before the first save may have been skipped."""
    for part in _torch_parts(optimizer):
        inner = part.optimizer
        for param in (param for group in inner.param_groups for param in group["params"]):
            if not inner.state[param]:
                inner.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }


def _torch_parts(optimizer: Any) -> list[Any]:
    """Megatron optimizers that hold torch's AdamW; apex's and Transformer Engine's Adam need no help."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if isinstance(part.optimizer, torch.optim.AdamW)]
