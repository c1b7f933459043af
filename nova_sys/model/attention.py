"""Core attention on packs, and on one new token per cached sequence: KV shifting, rotary positions, attention.

T packed tokens, N query heads, K key/value heads, H head dim (per tensor-parallel rank); S segments; F rotary_dim / 2.
Megatron's own rotary code restarts at every boundary and cannot give a branch its prefix's positions, so the model is built
with position_embedding_type="none" and everything between the projections happens here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from nova_kernels import kv_shift_rope, packed_attention
from nova_kernels.segments import SegmentIndex
from nova_sys.config import ModelConfig
from nova_sys.model.cache import DecodeLayout, PromptRows, decode_attention, mix, rotate, wide
from nova_sys.model.context_parallel import heads_to_tokens, stretch, tokens_to_heads
from nova_sys.model.rope import model_rope_tables


@dataclass(frozen=True)
class PackLayout:
    """What a layer needs to know of a pack. Travels through Megatron's layers in the place of its PackedSeqParams."""

    segments_S4: torch.Tensor
    index: SegmentIndex
    prompts: PromptRows | None = None
    """Where generation wants the pack's keys and values kept."""
    qkv_format: str = (
        "thd"  # Megatron then drops the batch dim of q, k and v: (T, 1, N, H) -> (T, N, H)
    )


class PackedCoreAttention(torch.nn.Module):
    """q, k, v of one pack -> attention output, with the optional KV-shift scalars as its only parameters.

    k_mix_K2, v_mix_K2: (K, 2) fp32-initialised, index 0 weighs the previous token and index 1 the current one.
    """

    cos_PF: torch.Tensor
    sin_PF: torch.Tensor

    def __init__(
        self,
        config: TransformerConfig,
        *,
        model: ModelConfig,
        max_positions: int,
        backend: str,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,  # attn_mask_type, attention_type, ...: Megatron passes them to every core attention
    ) -> None:
        super().__init__()
        head_dim = config.kv_channels or config.hidden_size // config.num_attention_heads
        self.window = model.heads_of(layer_number - 1).window
        cos_PF, sin_PF = model_rope_tables(model, max_positions, head_dim)
        self.register_buffer("cos_PF", cos_PF, persistent=False)
        self.register_buffer("sin_PF", sin_PF, persistent=False)
        self.rope_backend = self.attention_backend = backend
        self.layer_number = layer_number
        self.context = pg_collection.cp if pg_collection.cp.size() > 1 else None
        self.k_mix_K2 = self.v_mix_K2 = None
        if model.kv_shift:
            heads = (
                config.num_query_groups or config.num_attention_heads
            ) // config.tensor_model_parallel_size
            self.k_mix_K2, self.v_mix_K2 = (self._mix(heads, config) for _ in range(2))

    @staticmethod
    def _mix(heads: int, config: TransformerConfig) -> torch.nn.Parameter:
        mix_K2 = torch.nn.Parameter(
            torch.tensor([0.0, 1.0], dtype=config.params_dtype).repeat(heads, 1)
        )
        set_tensor_model_parallel_attributes(mix_K2, is_parallel=True, dim=0, stride=1)
        return mix_K2

    def forward(
        self,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        attention_mask: None = None,
        *,
        attn_mask_type: Any = None,
        attention_bias: None = None,
        packed_seq_params: PackLayout | DecodeLayout | None = None,
    ) -> torch.Tensor:
        layout = packed_seq_params
        assert layout is not None, "every forward runs on a pack or on cached sequences"
        if isinstance(layout, DecodeLayout):
            return self._decode(q_TNH, k_TKH, v_TKH, layout)
        segments_S4, index = layout.segments_S4, layout.index
        k_mix_K2, v_mix_K2 = self.k_mix_K2, self.v_mix_K2
        if self.context is not None:  # from here on N and K are this rank's heads
            q_TNH, k_TKH, v_TKH = (tokens_to_heads(x, self.context) for x in (q_TNH, k_TKH, v_TKH))
            if k_mix_K2 is not None and v_mix_K2 is not None:
                heads = stretch(len(k_mix_K2), self.context)
                k_mix_K2, v_mix_K2 = k_mix_K2[heads], v_mix_K2[heads]
        raw = (k_TKH, v_TKH)
        q_TNH, k_TKH, v_TKH = kv_shift_rope(
            q_TNH,
            k_TKH,
            v_TKH,
            segments_S4,
            k_mix_K2,
            v_mix_K2,
            self.cos_PF,
            self.sin_PF,
            schedule=index,
            backend=self.rope_backend,
        )
        if layout.prompts is not None:
            layout.prompts.write(self.layer_number, raw, (k_TKH, v_TKH), index.position_T)
        out_TNH = packed_attention(
            q_TNH,
            k_TKH,
            v_TKH,
            segments_S4,
            window=self.window,
            schedule=index,
            backend=self.attention_backend,
        )
        if self.context is not None:
            out_TNH = heads_to_tokens(out_TNH, self.context)
        return out_TNH.flatten(1)

    def _decode(
        self,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        layout: DecodeLayout,
    ) -> torch.Tensor:
        """The first B rows are new tokens of the B cached sequences; sequence parallelism may have padded them."""
        B, dtype = layout.row_B.shape[0], q_TNH.dtype
        q_BNH, k_BKH, v_BKH = q_TNH[:B], k_TKH[:B], v_TKH[:B]
        cos_BF, sin_BF = self.cos_PF[layout.position_B], self.sin_PF[layout.position_B]
        cached = layout.cache.layers[self.layer_number]
        key = rotate(mix(k_BKH, cached.last_key_BKH, self.k_mix_K2), cos_BF, sin_BF).to(dtype)
        value = mix(v_BKH, cached.last_value_BKH, self.v_mix_K2).to(dtype)
        cached.append(layout, raw=(k_BKH, v_BKH), final=(key, value))
        out_BNH = decode_attention(
            rotate(wide(q_BNH), cos_BF, sin_BF).to(dtype),
            cached.key_BKLH[:, :, : layout.longest],
            cached.value_BKLH[:, :, : layout.longest],
            layout.position_B + 1,
            window=self.window,
        )
        return torch.nn.functional.pad(out_BNH.flatten(1), (0, 0, 0, q_TNH.shape[0] - B))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Checkpoint layout: the scalars are split over the tensor-parallel ranks along the KV heads."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"k_mix_K2": 0, "v_mix_K2": 0},
            sharded_offsets,
        )
