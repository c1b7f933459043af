#include "cuda/linear_logprob/launch.h"

#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/common/tensor_map.h"
#include "cuda/linear_logprob/kernels.cuh"

namespace nova {

void linear_logprob_fwd(uintptr_t x_RD, uintptr_t w_VD, uintptr_t target_R, uintptr_t part_S3R, int rows,
                        int dim, int vocab, int splits, float scale, uintptr_t stream) {
  require_aligned(x_RD, 16, "x_RD");
  require_aligned(w_VD, 16, "w_VD");
  require_aligned(target_R, 4, "target_R");
  require_aligned(part_S3R, 4, "part_S3R");
  require(rows >= 1 && vocab >= 1 && vocab <= 0x7fffffff - kN,
          "rows and vocab must be positive, vocab + one tile an int32");
  require(dim >= 8 && dim % 8 == 0,
          "dim must be a positive multiple of 8, so that rows start at multiples of 16 bytes");
  require(splits >= 1, "splits must be positive");
  const LogprobWork work{ceil_div(ceil_div(rows, kM), 2), splits, ceil_div(vocab, kN)};
  const CUtensorMap map_x = map_matrix_bf16(reinterpret_cast<void*>(x_RD), rows, dim, kM);
  const CUtensorMap map_w = map_matrix_bf16(reinterpret_cast<void*>(w_VD), vocab, dim, kHalfN);
  allow_shared_memory(logprob_fwd, kLogprobSmemBytes);
  const int grid = std::min(multiprocessors() / 2, work.count()) * 2;  // clusters of two
  logprob_fwd<<<grid, 384, kLogprobSmemBytes, reinterpret_cast<cudaStream_t>(stream)>>>(
      map_x, map_w, reinterpret_cast<const int*>(target_R), reinterpret_cast<float*>(part_S3R), work, rows,
      vocab, ceil_div(dim, kK), scale);
  check(cudaGetLastError(), "logprob_fwd");
}

}  // namespace nova
