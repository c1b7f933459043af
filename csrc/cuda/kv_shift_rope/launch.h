// Host launchers of kv_shift_rope. Device pointers and the stream are integers.
//
// Rows of heads are bf16 (tokens, heads, head_dim) with strides in elements, multiples of 8, 16-byte aligned,
// the last dimension contiguous; the output of a part may be its input. head_dim is a multiple of 16 up to
// 256; F, the columns of the fp32 tables (positions, F), a multiple of 8. position_T and previous_T (tokens,)
// int64, previous -1 where there is none. mix_X2 (heads, 2) fp32: weights of the previous and the current
// row.
#pragma once
#include <cstdint>
#include <tuple>
#include <vector>

namespace nova {

using HeadView =
    std::tuple<uintptr_t, int64_t, int64_t>;  // pointer, elements from token to token, from head to head
using RopeTables = std::tuple<uintptr_t, uintptr_t, int, bool>;  // cos_PF, sin_PF, F, interleaved
using ShiftPart = std::tuple<HeadView, HeadView, int, uintptr_t,
                             bool>;  // in, out, heads, mix_X2 or 0, whether positions turn it

// Up to three parts (q, k, v) in one launch. sign 1: forward; -1, without mixes: turned back. blocks: thread
// blocks at most, 0: as many as there is work for; no result depends on it.
void shift_rope(const std::vector<ShiftPart>& parts, uintptr_t position_T, uintptr_t previous_T,
                const RopeTables& tables, int tokens, int head_dim, float sign, int blocks, uintptr_t stream);

int unmix_blocks(int tokens);  // B: blocks of tokens of `unmix`

// dx of a mixed part, and partial_BX2 (B, heads, 2) fp32, which summed over B is the gradient of its mix.
// offset_T1 (tokens + 1,) and tokens_J int32: the branches behind each token.
void unmix(const HeadView& dy, const HeadView& x, const HeadView& dx, int heads, uintptr_t mix_X2,
           uintptr_t partial_BX2, bool turns, uintptr_t position_T, uintptr_t previous_T,
           const std::tuple<uintptr_t, uintptr_t>& offset_T1_and_tokens_J, const RopeTables& tables,
           int tokens, int head_dim, uintptr_t stream);

}  // namespace nova
