"""Floating-point operations that a pack needs in a training step: what MFU counts.

    forward = sum over layers (2 * T * weights of the linear layers + 4 * N * H * pairs) + 2 * R * D * V,      training = 3 * forward

T tokens without padding, N query heads, H head dim, pairs: the (query, key) pairs that the attention allows, R response rows, D hidden,
V vocabulary. A multiply-add is two operations; the backward pass has two products for each one of the forward pass. What a pack does
not need does not count: padding, recomputation, masked parts of attention tiles, a reference model that runs online. Nor does
what is no matrix product (norms, SwiGLU, KV shifting, rotary positions: below a thousandth at the shapes of an 8B model).
"""

from __future__ import annotations

import numpy as np

from nova_sys.config import ModelConfig
from nova_sys.data.batch import Pack


def attention_pairs(segments_S4: np.ndarray, window: int = 0) -> int:
    """Allowed (query, key) pairs of a pack: causal within each segment, and every branch token sees its prefix.

    The token at position p of its sequence (a branch begins behind its prefix) sees p + 1 keys, or `window` if that is less.
    """
    start, end, prefix_start, prefix_end = segments_S4.astype(np.int64).T
    prefix, length = prefix_end - prefix_start, end - start
    pairs = length * (length + 1) // 2 + length * prefix
    if window:  # without the p + 1 - window keys that are too far back, where that is positive
        over, before = (np.maximum(x - window, 0) for x in (prefix + length, prefix))
        pairs -= (over * (over + 1) - before * (before + 1)) // 2
    return int(pairs.sum())


def training_flops(model: ModelConfig, vocab_size: int, pack: Pack) -> float:
    """Forward and backward of one pack, by the equation at the top of this file."""
    width, segments_S4 = model.hidden_size, pack.segments_S4
    segments_S4 = segments_S4[segments_S4[:, 0] < pack.num_tokens]  # the others are padding
    products = width * vocab_size * len(pack.row_R)
    for (heads, kv_heads, head_dim, window), num_layers in model.kinds_of_layers().items():
        weights = width * (2 * (heads + kv_heads) * head_dim + 3 * model.ffn_hidden_size)
        attention = 2 * heads * head_dim * attention_pairs(segments_S4, window)
        products += num_layers * (weights * pack.num_tokens + attention)
    return 3.0 * 2.0 * products
