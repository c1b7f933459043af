// Host launchers of linear_logprob. Device pointers and the stream are integers; a pointer may be 0 only
// where that is said.
//
// x_RD (rows, dim), w_VD (vocab, dim): bf16, contiguous, at multiples of 16 bytes, dim a multiple of 8.
// z = x w^T inverse_norm inverse_temperature. target_R (rows,) int32: any value outside [0, vocab) matches
// nothing. inverse_norm_V fp32, or 0; all of its ceil(vocab / 256) * 256 values are read. clusters: pairs of
// thread blocks, at most as many as are useful; no result depends on it.
#pragma once
#include <cstdint>

namespace nova {

// The state of each row's softmax over `splits` ranges of the vocabulary, state_5SR (5, splits, rows) fp32:
// max z, sum of exp(z - max), target's z or -inf, sum of exp(z - max) (z - max) if `entropy`, the first
// column of the maximum if `argmax`. `group`: pairs of row tiles (256 rows) that walk the vocabulary
// together. e_RV (rows, ceil(vocab / 256) * 256) bf16 at a multiple of 16 bytes, and max_KR (ceil(vocab /
// 256), rows) fp32, or both 0: exp(z - max_KR[column / 256]), where max_KR is the row's maximum so far.
void linear_logprob_fold(uintptr_t x_RD, uintptr_t w_VD, uintptr_t target_R, uintptr_t inverse_norm_V,
                         uintptr_t state_5SR, uintptr_t e_RV, uintptr_t max_KR, int rows, int dim, int vocab,
                         int splits, int group, int clusters, float inverse_temperature, bool entropy,
                         bool argmax, uintptr_t stream);

// dz_RW (rows, width) bf16 = d loss / d (x w^T) of the columns [wave_start, wave_start + 256 * wave_tiles),
// the first at column 0; 0 at and beyond vocab. rows_8R (8, rows) fp32: max, log2 of the sum, target's z, g,
// h, entropy, k, argmax; h to argmax are read if `extras`. g, h and k are
// upstream gradients times inverse_temperature. wave_start is a multiple of 256, width a multiple of 8.
void linear_logprob_dlogits(uintptr_t x_RD, uintptr_t w_VD, uintptr_t target_R, uintptr_t inverse_norm_V,
                            uintptr_t rows_8R, uintptr_t dz_RW, int rows, int dim, int vocab, int width,
                            int wave_start, int wave_tiles, int group, int clusters,
                            float inverse_temperature, bool extras, uintptr_t stream);

// The same from e_RV and max_KR of linear_logprob_fold.
void linear_logprob_stored_dlogits(uintptr_t e_RV, uintptr_t max_KR, uintptr_t target_R,
                                   uintptr_t inverse_norm_V, uintptr_t rows_8R, uintptr_t dz_RW, int rows,
                                   int vocab, int width, int wave_start, int wave_tiles, bool extras,
                                   uintptr_t stream);

}  // namespace nova
