// delta = rowsum(dO * O) of every token and head, which both backward kernels read: bound by memory.
#pragma once
#include "cuda/common/hopper.cuh"
#include "cuda/packed_attention/work.h"

namespace nova {

constexpr int kDeltaThreads = 256;
template <int H>
constexpr int kDeltaRows = kDeltaThreads * 8 / H;  // of a block: 16 bytes of a row per thread

NOVA_DEV float dot_pair(uint32_t a, uint32_t b) {  // of two bf16 each
  return fmaf(__uint_as_float(a << 16), __uint_as_float(b << 16),
              __uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u));
}

// out_TNH is contiguous; rows of d_out are heads side by side, `d_out_stride` elements from token to token.
template <int H>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_delta(const __nv_bfloat16* __restrict__ out_TNH, const __nv_bfloat16* __restrict__ d_out,
                    int64_t d_out_stride, float* __restrict__ delta, AttentionShape shape) {
  constexpr int kLanes = H / 8;
  const int64_t rows = static_cast<int64_t>(shape.tokens) * shape.heads;
  const int64_t wanted = static_cast<int64_t>(blockIdx.x) * kDeltaRows<H> + threadIdx.x / kLanes;
  const int64_t row = wanted < rows ? wanted : rows - 1;  // whole warps take part in the shuffles
  const int token = static_cast<int>(row / shape.heads), head = static_cast<int>(row % shape.heads);
  const int part = threadIdx.x % kLanes;
  const uint4 x = reinterpret_cast<const uint4*>(out_TNH + row * H)[part];
  const uint4 y = reinterpret_cast<const uint4*>(d_out + token * d_out_stride + head * H)[part];
  float sum = (dot_pair(x.x, y.x) + dot_pair(x.y, y.y)) + (dot_pair(x.z, y.z) + dot_pair(x.w, y.w));
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
  const int pack = head >> shape.pack_shift, in_pack = head & ((1 << shape.pack_shift) - 1);
  if (part == 0 && wanted < rows) delta[shape.scalar(pack, token, in_pack)] = sum;
}

}  // namespace nova
