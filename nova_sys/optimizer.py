"""Megatron's optimizer (AdamW, optionally distributed) and its learning-rate schedule, from our config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from nova_sys.config import OptimizerConfig
from nova_sys.parallel import Parallel


def wrap_for_training(
    chunks: Sequence[Any], config: TransformerConfig, parallel: Parallel, *, distributed_optimizer: bool
) -> list[DistributedDataParallel]:
    """Gives every chunk its gradient buffers (fp32) and its reduction over the data-parallel ranks."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        average_in_collective=False,  # sums here, one division by the global count in finalize_model_grads
        check_for_nan_in_grad=True,
    )
    config.finalize_model_grads_func = finalize_model_grads
    return [
        DistributedDataParallel(
            config=config,
            ddp_config=ddp_config,
            module=chunk,
            disable_bucketing=index > 0,
            pg_collection=parallel.groups,
        )
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], config: OptimizerConfig, *, dtype: torch.dtype, distributed: bool
) -> Any:
    """AdamW over fp32 master weights. Norms, biases and the KV-shift scalars are not decayed."""
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
        use_distributed_optimizer=distributed,
    )
    overrides = get_standard_config_overrides(options)
    overrides[ParamKey(name=("*.k_mix_K2", "*.v_mix_K2"))] = {"wd_mult": 0.0}  # pyright: ignore[reportArgumentType]
    return get_megatron_optimizer(options, list(chunks), config_overrides=overrides)


def build_schedule(optimizer: Any, config: OptimizerConfig, *, total_steps: int) -> OptimizerParamScheduler:
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
