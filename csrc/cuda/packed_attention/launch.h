// Host launchers of packed_attention. Device pointers and the stream are integers.
//
// All tensors bf16. q, d_out (tokens, heads, head_dim) and k, v (tokens, kv_heads, head_dim) may be slices of
// wider rows: heads side by side, a stride from token to token that is a multiple of 8 elements, 16-byte
// aligned. out, dq, dk, dv are contiguous and written whole: every row of every segment; the table covers the
// pack. lse2 (the log-sum-exp of the scaled scores, base 2) and delta: fp32 (packs, row_stride), see
// AttentionShape. Tile lists: rows of host/attention_tiles.h, cut for attention_forward_tokens(shape) or
// attention_dq_tokens(shape) and for kKeys tokens. blocks: thread blocks of a launch at
// most, 0: one per multiprocessor; no result depends on it.
#pragma once
#include <cstdint>
#include <tuple>
#include <utility>

#include "cuda/packed_attention/work.h"

namespace nova {

using Rows = std::pair<uintptr_t, int64_t>;       // pointer, elements from token to token
using TileList = std::pair<uintptr_t, int>;       // pointer to int32 (n, 5), n
using Scalars = std::pair<uintptr_t, uintptr_t>;  // lse2, delta

// Checks the sizes, and packs as many query heads of a key head as a power of two up to 16 divides.
AttentionShape attention_shape(int tokens, int heads, int kv_heads, int head_dim);
int attention_forward_tokens(const AttentionShape& shape);  // of a query tile, forward
int attention_dq_tokens(const AttentionShape& shape);       // of a query tile, backward

// out and lse2.
void attention_forward(const AttentionShape& shape, const Rows& q, const Rows& k, const Rows& v,
                       const TileList& query_tiles, uintptr_t out, uintptr_t lse2, float softmax_scale,
                       int blocks, uintptr_t stream);
// delta from out and d_out, then dq, then dk and dv. partials: with P = attention_key_parts(key tiles,
// kv_heads) above 1, fp32 (2, P, tokens, kv_heads, head_dim) as workspace, else 0.
void attention_backward(const AttentionShape& shape, const Rows& q, const Rows& k, const Rows& v,
                        const Rows& d_out, const TileList& query_tiles, const TileList& key_tiles,
                        uintptr_t out, const Scalars& lse2_and_delta,
                        const std::tuple<uintptr_t, uintptr_t, uintptr_t>& dq_dk_dv, uintptr_t partials,
                        float softmax_scale, int blocks, uintptr_t stream);

}  // namespace nova
