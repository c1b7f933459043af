"""The rules of `[fp8]`, for `config_rules`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

from nova_sys.config import Fp8Config, RunConfig

MULTIPLE = 16
"""Every dimension of an FP8 matrix product: cuBLAS reads 16 bytes at a time."""
BLOCK = 128
"""blockwise: values that share a scale."""
LARGEST_LAYERS = 2**31 - 1


def fp8_problems(config: RunConfig) -> list[str]:
    if config.train.precision != "fp8":
        default = asdict(Fp8Config())
        return [
            f"fp8.{key} = {json.dumps(value)}: has no effect with train.precision = "
            f'"{config.train.precision}"; leave it out, or set train.precision to "fp8"'
            for key, value in asdict(config.fp8).items()
            if value != default[key]
        ]
    return _edge_problems(config) or [
        *_host_problems(config),
        *_gather_problems(config),
        *_shape_problems(config),
    ]


def _host_problems(config: RunConfig) -> list[str]:
    if config.algo.reference != "host":
        return []
    return [
        'algo.reference = "host": Transformer Engine keeps the rounded weights of every model on the GPU, which this reference is there to avoid; '
        'use "cache" with train.precision = "fp8"'
    ]


def _gather_problems(config: RunConfig) -> list[str]:
    if not config.fp8.param_gather:
        return []
    problems = []
    if not config.parallel.distributed_optimizer:
        problems.append(
            "fp8.param_gather = true: needs parallel.distributed_optimizer = true, whose fp32 weights are then the only exact ones; set that, or "
            "leave fp8.param_gather out"
        )
    if config.fp8.recipe == "delayed":
        problems.append(
            'fp8.param_gather = true: does not work with fp8.recipe = "delayed", which would round the first weights with a scale of 1; use '
            "another fp8.recipe, or leave fp8.param_gather out"
        )
    return problems


def _edge_problems(config: RunConfig) -> list[str]:
    """Of the first and last layers, which may stay in bf16."""
    fp8, num_layers = config.fp8, config.model.num_layers
    given = {
        "fp8.first_layers_bf16": fp8.first_layers_bf16,
        "fp8.last_layers_bf16": fp8.last_layers_bf16,
    }
    problems = [
        f'{key} = {number}: must be "auto", or 0 or more, at most {LARGEST_LAYERS}; it is a number of layers'
        for key, number in given.items()
        if isinstance(number, int) and not 0 <= number <= LARGEST_LAYERS
    ]
    if problems:
        return problems
    if fp8.recipe == "delayed":
        return [
            f'{key} = {number}: must be 0 or "auto" with fp8.recipe = "delayed", which updates its scales once for all layers; leave it out, or '
            "use another fp8.recipe"
            for key, number in given.items()
            if number not in ("auto", 0)
        ]
    first, last = fp8.edge_layers
    if first + last >= num_layers:
        return [
            f"fp8.first_layers_bf16 + fp8.last_layers_bf16 = {first} + {last}: must be below model.num_layers = {num_layers}, or no layer "
            'would run in FP8; lower them, or set train.precision to "bf16"'
        ]
    per_stage = num_layers // config.parallel.pipeline
    return [
        f"{key} = {number}: must not exceed the {per_stage} layers of a pipeline stage (model.num_layers = {num_layers} / parallel.pipeline = "
        f"{config.parallel.pipeline}); lower it"
        for key, number in zip(given, (first, last), strict=True)
        if number > per_stage
    ]


def _shape_problems(config: RunConfig) -> list[str]:
    """Dimensions of the products that one rank computes."""
    model, parallel, fp8 = config.model, config.parallel, config.fp8
    tensor, context = parallel.tensor, parallel.context
    own_tokens = config.data.pack_length // (context * (tensor if parallel.sequence else 1))
    tokens = f"data.pack_length = {config.data.pack_length}"
    ranks = f"parallel.context = {context}"
    if parallel.sequence:
        ranks += f" * parallel.tensor = {tensor}"
    if context > 1 or parallel.sequence:
        tokens = f"{tokens} / ({ranks})"
    over = f" / parallel.tensor = {tensor}" if tensor > 1 else ""
    sizes = {
        tokens: own_tokens,
        f"model.hidden_size = {model.hidden_size}": model.hidden_size,
        f"model.ffn_hidden_size = {model.ffn_hidden_size}{over}": model.ffn_hidden_size // tensor,
    }
    for heads, kv_heads, dim, _ in model.kinds_of_layers():
        sizes[f"{heads} query heads of {dim}{over}"] = heads * dim // tensor
        both = heads + 2 * kv_heads
        sizes[f"{heads} + 2 * {kv_heads} heads of {dim}{over}"] = both * dim // tensor
    wanted = dict.fromkeys(sizes, MULTIPLE)
    reason = "the products of FP8 numbers need it"
    if parallel.sequence and fp8.recipe == "blockwise":
        wanted |= dict.fromkeys(list(sizes)[:2], BLOCK)  # what the tensor-parallel ranks gather
        reason += f"; with parallel.sequence, blocks of {BLOCK} values must not lie across ranks"
    return [
        f'{name}, which is {size}: must be a multiple of {wanted[name]} with train.precision = "fp8" (fp8.recipe = "{fp8.recipe}"): {reason}; '
        f'change it, for example to give {math.ceil(size / wanted[name]) * wanted[name]}, or set train.precision to "bf16"'
        for name, size in sizes.items()
        if size % wanted[name]
    ]
