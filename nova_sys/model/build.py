"""RunConfig.model -> Megatron modules with layout-independent initial weights.

Every weight is drawn from a generator seeded by its global name and then sliced, so a model of one seed is the same model on
every TP x PP x VPP layout; Megatron's own initialisation depends on the layout.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from nova_kernels.backend import cuda_runs_on, triton_runs_on
from nova_kernels.packed_attention.schedule import tile_sizes
from nova_sys.config import VOCAB_MULTIPLE, Fp8Config, ModelConfig
from nova_sys.model.gpt import PackedGPT
from nova_sys.model.output_layer import LogprobOutputLayer
from nova_sys.model.specs import RMSNorm, core_attention_spec, layer_spec
from nova_sys.model.te import mcore_fields, plain_weights, te_spec
from nova_sys.parallel import Parallel
from nova_sys.weight_names import split_layer


def padded_vocab_size(vocab_size: int) -> int:
    return math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def head_dim(model: ModelConfig) -> int:
    return model.head_dim or model.hidden_size // model.num_heads


def check_kernels(requested: str, device: torch.device) -> None:
    """Raises: ValueError when the kernels of `train.kernels` cannot run here. Before the data is prepared; what an op lacks for
    certain shapes it says itself."""
    runs = {"triton": triton_runs_on, "cuda": cuda_runs_on}
    if requested in runs and not runs[requested](device):
        needs = {
            "triton": "an NVIDIA GPU and the package triton",
            "cuda": "a Hopper GPU and an installation built where nvcc is",
        }[requested]
        here = "on the CPU" if device.type == "cpu" else "on a GPU, without one of the two"
        raise ValueError(
            f'train.kernels = "{requested}": needs {needs}, and this process runs {here}; set it to "auto" or "reference"'
        )


def attention_tile_sizes(
    model: ModelConfig, parallel: Parallel, kernels: str
) -> list[tuple[int, int]]:
    """Of the lists of tiles that this rank's attention loops over, so that the loader can make them."""
    ranks = parallel.tensor_size * parallel.context_size
    sizes = [
        tile_sizes(kind.num_heads // ranks, kind.num_kv_heads // ranks, kind.head_dim, kernels)
        for kind in model.kinds_of_layers()
    ]
    return list(dict.fromkeys(size for of_kind in sizes for size in of_kind))


def _leave_as_is(weight: torch.Tensor) -> None: ...


def count_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of the whole model, without the padding of the vocabulary."""
    width = model.hidden_size
    total = vocab_size * width * (1 if model.tied_embeddings else 2) + width
    for (heads, kv_heads, dim, _), num_layers in model.kinds_of_layers().items():
        layer = width * dim * (2 * heads + 2 * kv_heads)
        layer += 3 * width * model.ffn_hidden_size + 2 * width
        if model.kv_shift:
            layer += 4 * kv_heads
        if model.qkv_bias:
            layer += dim * (heads + 2 * kv_heads)
        if model.qk_norm:
            layer += 2 * dim
        total += num_layers * layer
    return total


def transformer_config(
    model: ModelConfig,
    parallel: Parallel,
    *,
    dtype: torch.dtype,
    fp8: Fp8Config | None = None,
    recompute: str = "none",
    recompute_layers: int = 1,
    fuse_swiglu: bool = False,
) -> TransformerConfig:
    """Megatron's configuration of our decoder. No dropout anywhere: preference losses compare two forwards of one policy.

    fuse_swiglu: compiled by torch into kernels that keep SwiGLU's input alone for the backward pass.
    """
    bf16 = dtype == torch.bfloat16
    full = recompute == "full"
    recompute_options = {
        "recompute_granularity": None if recompute == "none" else recompute,
        "recompute_method": "uniform" if full else None,
        "recompute_num_layers": recompute_layers if full else None,
    }
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=head_dim(model),
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,  # sums these norms' gradients over the tensor-parallel ranks, which have other heads
        bias_activation_fusion=fuse_swiglu,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # initialize_weights sets the values; Megatron's own initialisation still has to mark the tensor-parallel weights
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        embedding_init_method=_leave_as_is,
        tensor_model_parallel_size=parallel.tensor_size,
        context_parallel_size=parallel.context_size,
        pipeline_model_parallel_size=parallel.pipeline_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_size
        if parallel.virtual_size > 1
        else None,
        sequence_parallel=parallel.sequence,
        # interleaved on two stages, both neighbours are the same rank, and batched sends would be matched in the wrong order
        overlap_p2p_comm=parallel.virtual_size > 1,
        batch_p2p_comm=parallel.virtual_size == 1,
        hetereogenous_dist_checkpoint=model.layers_differ,  # no common tensor for weights of several shapes
        calculate_per_token_loss=True,  # losses are sums; finalize_model_grads divides by the global count once
        deterministic_mode=False,
        **recompute_options,
        **(mcore_fields(fp8) if fp8 else {}),
    )


def build_model(
    model: ModelConfig,
    config: TransformerConfig,
    parallel: Parallel,
    *,
    vocab_size: int,
    max_positions: int,
    seed: int,
    backend: str = "auto",
) -> list[PackedGPT]:
    """This rank's chunks of the model (one per virtual pipeline stage), initialised from `seed`."""
    attention = core_attention_spec(model, max_positions=max_positions, backend=backend)
    layer = layer_spec(attention, model)
    if config.fp8:
        layer = te_spec(layer)
    layers_per_chunk = model.num_layers // (parallel.pipeline_size * parallel.virtual_size)
    chunks = []
    for chunk in range(parallel.virtual_size):
        gpt = PackedGPT(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(  # pyright: ignore[reportArgumentType]
                layer_specs=[layer] * layers_per_chunk,
                layer_norm=RMSNorm,  # pyright: ignore[reportArgumentType]
            ),
            vocab_size=padded_vocab_size(vocab_size),
            max_sequence_length=max_positions,
            pre_process=parallel.first_stage(chunk),
            post_process=parallel.last_stage(chunk),
            position_embedding_type="none",
            share_embeddings_and_output_weights=model.tied_embeddings,
            pg_collection=parallel.groups,
            vp_stage=chunk if parallel.virtual_size > 1 else None,
        )
        if gpt.post_process:
            LogprobOutputLayer.adopt(
                gpt.output_layer,
                groups=parallel.groups,
                vocab_size=vocab_size,
                normalize_weight=model.norm_head,
                backend=backend,
            )
        chunks.append(gpt.to(parallel.device))
    with plain_weights(chunks):
        initialize_weights(chunks, model, seed)
    return chunks


def shards_of(chunk: PackedGPT) -> Iterator[ShardedTensor]:
    """This rank's parameters with their place in the whole model; `data` is a view of the parameter."""
    for entry in chunk.sharded_state_dict().values():
        if isinstance(entry, ShardedTensorFactory):  # SwiGLU's two halves in one weight
            yield from entry.build()  # pyright: ignore[reportReturnType]
        elif isinstance(entry, ShardedTensor):
            yield entry


def layer_of(shard: ShardedTensor) -> tuple[str, int | None]:
    """The name of a weight without a layer's number, and the layer, counted from 0; None for a weight of none.

    Megatron keeps layers of one shape as one tensor, whose first axis is the layer; else the number stands in the name.
    """
    if shard.prepend_axis_num:
        return shard.key, int(shard.global_offset[0])
    return split_layer(shard.key)


@torch.no_grad()
def initialize_weights(chunks: list[PackedGPT], model: ModelConfig, seed: int) -> None:
    """normal(0, init_std); projections into the residual stream / sqrt(2 layers); norms 1; biases 0; KV-shift scalars by config."""
    for chunk in chunks:
        for shard in shards_of(chunk):
            assert shard.data is not None
            ours = tuple(
                slice(offset, offset + size)
                for offset, size in zip(shard.global_offset, shard.global_shape, strict=True)
            )[shard.prepend_axis_num :]
            ours = tuple(
                slice(s.start, s.start + n) for s, n in zip(ours, shard.local_shape, strict=True)
            )
            full = _initial_value(shard, model, seed)
            shard.data.copy_(full[ours])


def _initial_value(shard: ShardedTensor, model: ModelConfig, seed: int) -> torch.Tensor:
    shape = tuple(shard.global_shape[shard.prepend_axis_num :])
    key, layer = layer_of(shard)
    name = f"{key}@{() if layer is None else (layer,)}"
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    if "mix_K2" in name:
        current_K = torch.ones(shape[0])
        if model.kv_shift_init == "random":
            current_K = torch.rand(shape[0], generator=generator)
        return torch.stack([1 - current_K, current_K], dim=1)
    if "norm" in name:
        return torch.ones(shape)
    if name.partition("@")[0].endswith(".bias"):
        return torch.zeros(shape)
    std = model.init_std
    if "linear_proj" in name or "linear_fc2" in name:
        std /= math.sqrt(2 * model.num_layers)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
