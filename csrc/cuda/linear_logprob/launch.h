// Host launchers of linear_logprob. Device pointers and the stream are integers.
#pragma once
#include <cstdint>

namespace nova {

// States of softmax rows over `splits` ranges of the vocabulary: part_S3R (splits, 3, rows) fp32 = max, sum
// of exp2((z - max) scale), target's logit or -inf; z = x w^T unscaled, scale = log2(e) / temperature. x_RD
// (rows, dim) and w_VD (vocab, dim) bf16, contiguous, 16-byte aligned, dim a multiple of 8; target_R (rows,)
// int32, any value outside [0, vocab) matches nothing.
void linear_logprob_fwd(uintptr_t x_RD, uintptr_t w_VD, uintptr_t target_R, uintptr_t part_S3R, int rows,
                        int dim, int vocab, int splits, float scale, uintptr_t stream);

}  // namespace nova
