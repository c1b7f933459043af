"""Which modules a transformer layer is made of: Megatron's linear layers, our norm and our attention.

All construction of Megatron modules stays in `nova_sys.model`, because GPTModel's neighbours change between releases.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from nova_sys.config import ModelConfig
from nova_sys.model.attention import PackedCoreAttention


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight. Megatron's torch norm refuses sequence parallelism; marking the weight is all it takes:
    its gradient is then summed over the tensor-parallel ranks, which see different tokens."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x_SBD: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x_SBD, (x_SBD.size(-1),), self.weight, self.eps)


class LayerAttention(SelfAttention):
    """With this layer's heads: Megatron takes those of the whole model."""

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        layer_number: int,
        model: ModelConfig,
        **kwargs: Any,
    ) -> None:
        heads = model.heads_of(layer_number - 1)
        config = copy.copy(config)
        config.num_attention_heads, config.num_query_groups = heads.num_heads, heads.num_kv_heads
        config.kv_channels = heads.head_dim
        super().__init__(config, *args, layer_number=layer_number, **kwargs)


def layer_spec(core_attention: ModuleSpec, model: ModelConfig) -> ModuleSpec:
    # Megatron's places for it are before core_attention.
    head_norm: Any = RMSNorm if model.qk_norm else None
    attention = ModuleSpec(
        module=LayerAttention,
        params={"attn_mask_type": AttnMaskType.causal, "model": model},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=core_attention,  # pyright: ignore[reportArgumentType]
            linear_proj=RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
        ),
    )


def core_attention_spec(
    model: ModelConfig, *, max_positions: int, backend: str = "auto"
) -> ModuleSpec:
    return ModuleSpec(
        module=PackedCoreAttention,
        params={"model": model, "max_positions": max_positions, "backend": backend},
    )
