"""The key/value cache of decoding, and what a layer does with one new token per sequence.

B sequences, L cached positions, N query heads, K key/value heads, H head dim (per tensor-parallel rank); T tokens of a pack;
P prompts in it; F rotary_dim / 2; X stands for N or K.

Attention reads keys that are mixed (KV shifting) and rotated, and values that are mixed. Those are kept, so that a step works on its
new tokens only; a cache of raw keys would have to be mixed and rotated anew, whole, at every step. The raw key and value of each
sequence's last token are kept besides, because the next token's mix needs them, and nothing else does.

Memory per rank:  2 * K * H * (L + 1) * B * bytes per element in each layer,  L = longest prompt + new tokens of the batch (also with a window).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch.nn.functional import scaled_dot_product_attention


@dataclass
class LayerCache:
    """Keys and values of one layer; positions not written yet hold zeros."""

    key_BKLH: torch.Tensor
    """Mixed and rotated."""
    value_BKLH: torch.Tensor
    """Mixed."""
    last_key_BKH: torch.Tensor
    """Raw: the projection's output for each sequence's last token."""
    last_value_BKH: torch.Tensor

    def append(
        self,
        layout: DecodeLayout,
        raw: tuple[torch.Tensor, torch.Tensor],
        final: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """The new tokens' keys and values (B, K, H): `raw` from the projection, `final` as attention reads them."""
        places = (layout.row_B, slice(None), layout.position_B)
        self.key_BKLH[places], self.value_BKLH[places] = final
        self.last_key_BKH, self.last_value_BKH = raw


@dataclass
class KVCache:
    """The cache of one batch: a LayerCache for each layer of this rank, made when the layer first writes to it."""

    num_sequences: int
    capacity: int
    """L."""
    layers: dict[int, LayerCache] = field(default_factory=dict)

    def layer(self, number: int, like_TKH: torch.Tensor) -> LayerCache:
        if number not in self.layers:
            _, K, H = like_TKH.shape
            wide, last = (self.num_sequences, K, self.capacity, H), (self.num_sequences, K, H)
            self.layers[number] = LayerCache(
                *(like_TKH.new_zeros(shape) for shape in (wide, wide, last, last))
            )
        return self.layers[number]

    def select(self, row_X: torch.Tensor) -> None:
        """Keeps these sequences, in this order; one that is named twice is copied."""
        for layer in self.layers.values():
            for entry in fields(layer):
                setattr(layer, entry.name, getattr(layer, entry.name)[row_X])
        self.num_sequences = row_X.shape[0]


@dataclass(frozen=True)
class PromptRows:
    """Where the prompts of a pack go in a cache: its first t tokens are prompts, whole, and padding may follow."""

    cache: KVCache
    row_t: torch.Tensor
    """(t,) int64: the cached sequence that each token belongs to."""
    row_P: torch.Tensor
    """(P,) int64: the sequence of each prompt, and"""
    last_P: torch.Tensor
    """(P,) int64: its last token in the pack."""

    def write(
        self,
        number: int,
        raw: tuple[torch.Tensor, torch.Tensor],
        final: tuple[torch.Tensor, torch.Tensor],
        position_T: torch.Tensor,
    ) -> None:
        """Keys and values (T, K, H) of layer `number`; see LayerCache.append."""
        layer = self.cache.layer(number, final[0])
        num_tokens = self.row_t.shape[0]
        places = (self.row_t, slice(None), position_T[:num_tokens])
        layer.key_BKLH[places], layer.value_BKLH[places] = (x_TKH[:num_tokens] for x_TKH in final)
        layer.last_key_BKH[self.row_P], layer.last_value_BKH[self.row_P] = (
            x_TKH[self.last_P] for x_TKH in raw
        )


@dataclass(frozen=True)
class DecodeLayout:
    """One new token for each cached sequence. Travels to the layers where a pack's PackLayout does."""

    cache: KVCache
    row_B: torch.Tensor
    """(B,) int64: 0 .. B - 1."""
    position_B: torch.Tensor
    """(B,) int64: the new token's position, which is the number of cached ones."""
    longest: int
    """One more than the largest of them, on the host: how much of the cache a step reads."""
    qkv_format: str = "thd"


def decode_attention(
    q_BNH: torch.Tensor,
    key_BKLH: torch.Tensor,
    value_BKLH: torch.Tensor,
    length_B: torch.Tensor,
    *,
    window: int = 0,
) -> torch.Tensor:
    """Attention of one query per sequence over a padded cache.

    out[b, n] = sum_j p[j] value[b, n // (N / K), j],   p = softmax over j < length[b] of <q[b, n], key[b, n // (N / K), j]> / sqrt(H)

    Args:     q_BNH (B, N, H); key_BKLH, value_BKLH (B, K, L, H) of its dtype, finite also behind length; length_B (B,) int64, 1 .. L.
              window: how many of the last positions are seen, 0: all.
    Returns:  out_BNH of q's dtype; scores and softmax in at least fp32.   Memory: O(B * N * L); keys are not repeated.
    """
    (B, N, H), (K, L) = q_BNH.shape, key_BKLH.shape[1:3]
    position_L = torch.arange(L, device=q_BNH.device)
    seen_BL = position_L < length_B[:, None]
    if window:
        seen_BL &= position_L >= length_B[:, None] - window
    # The N / K query heads of a key head stand where a sequence's queries would: grouped heads need no copies of the keys.
    q_BKGH = q_BNH.view(B, K, N // K, H)
    out_BKGH = scaled_dot_product_attention(
        q_BKGH, key_BKLH, value_BKLH, attn_mask=seen_BL[:, None, None]
    )
    return out_BKGH.reshape(B, N, H)


def mix(x_BKH: torch.Tensor, last_BKH: torch.Tensor, mix_K2: torch.Tensor | None) -> torch.Tensor:
    """x of this token and of the one before it, weighed by KV shifting's scalars; in at least fp32."""
    x = wide(x_BKH)
    if mix_K2 is None:
        return x
    previous_K, current_K = mix_K2.to(x.dtype).unbind(1)
    return x * current_K[:, None] + last_BKH.to(x.dtype) * previous_K[:, None]


def rotate(x_BXH: torch.Tensor, cos_BF: torch.Tensor, sin_BF: torch.Tensor) -> torch.Tensor:
    """Rotary positions on the first 2 F dims of each head, in pairs (i, i + F), in x's dtype."""
    half = cos_BF.shape[1]
    cos, sin = (table_BF.to(x_BXH.dtype)[:, None] for table_BF in (cos_BF, sin_BF))
    x1, x2, rest = x_BXH[..., :half], x_BXH[..., half : 2 * half], x_BXH[..., 2 * half :]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1)


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
