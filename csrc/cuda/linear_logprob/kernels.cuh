// linear_logprob forward for sm_90a: logits of M128 x N320 tiles live only in registers and are folded into
// (max, sum of exp2, target). Cluster of 2 CTAs along the rows: both need the same W tile, so each loads 160
// of its 320 rows and multicasts them to both.
#pragma once
#include "cuda/common/hopper.cuh"
#include "cuda/linear_logprob/work.h"

namespace nova {

constexpr int kM = 128, kN = 320, kHalfN = 160, kK = 64, kDepth = 4;
constexpr int kXBytes = kM * kK * 2, kWHalfBytes = kHalfN * kK * 2;
struct alignas(1024) LogprobSmem {
  uint8_t x[kDepth][kXBytes];
  uint8_t w[kDepth][2][kWHalfBytes];
  uint64_t full[kDepth], empty[kDepth];
};
constexpr int kLogprobSmemBytes = sizeof(LogprobSmem) + 1024;
static_assert(kLogprobSmemBytes <= 227 * 1024, "over the 227 KB a block can have");

// Running state of this thread's share of one row (its columns only; the four lanes of a row are merged once,
// at the end).
struct RowState {
  float max, sum, target;
};

template <int C>
NOVA_DEV void fold(float (&z)[C], RowState& top, RowState& bottom,
                   float scale) {  // scale = log2(e) / temperature
  float m0 = top.max, m1 = bottom.max;
#pragma unroll
  for (int i = 0; i < C; i += 4) {
    m0 = fmaxf(m0, fmaxf(z[i], z[i + 1]));
    m1 = fmaxf(m1, fmaxf(z[i + 2], z[i + 3]));
  }
  // A thread may own no valid column yet (tail tile first, or a shard of vocabulary padding): -inf - -inf
  // would be NaN.
  const float c0 = m0 == -INFINITY ? 0.f : m0 * scale, c1 = m1 == -INFINITY ? 0.f : m1 * scale;
  float a0 = 0.f, a1 = 0.f, b0 = 0.f, b1 = 0.f;  // two chains per row hide the add latency
#pragma unroll
  for (int i = 0; i < C; i += 4) {
    a0 += exp2_fast(fmaf(z[i], scale, -c0));
    a1 += exp2_fast(fmaf(z[i + 1], scale, -c0));
    b0 += exp2_fast(fmaf(z[i + 2], scale, -c1));
    b1 += exp2_fast(fmaf(z[i + 3], scale, -c1));
  }
  top.sum = fmaf(top.sum, exp2_fast(fmaf(top.max, scale, -c0)), a0 + a1);
  bottom.sum = fmaf(bottom.sum, exp2_fast(fmaf(bottom.max, scale, -c1)), b0 + b1);
  top.max = m0;
  bottom.max = m1;
}
// first_col = this thread's column of z[0]. Compile-time register indices only; taken for about one tile in
// 25 per warp.
template <int C>
NOVA_DEV void pick_target(const float (&z)[C], int first_col, int t0, int t1, RowState& top,
                          RowState& bottom) {
#pragma unroll
  for (int i = 0; i < C; i += 4) {
    const int col = first_col + 2 * i;  // 8 columns per group of 4 values
    if (col == t0) top.target = z[i];
    if (col + 1 == t0) top.target = z[i + 1];
    if (col == t1) bottom.target = z[i + 2];
    if (col + 1 == t1) bottom.target = z[i + 3];
  }
}
template <int C>
NOVA_DEV void mask_tail(float (&z)[C], int first_col, int vocab) {
#pragma unroll
  for (int i = 0; i < C; i += 4) {
    const int col = first_col + 2 * i;
    if (col >= vocab) z[i] = z[i + 2] = -INFINITY;
    if (col + 1 >= vocab) z[i + 1] = z[i + 3] = -INFINITY;
  }
}
NOVA_DEV void merge_lanes(RowState& s, float scale) {
#pragma unroll
  for (int d = 1; d < 4; d *= 2) {
    const float m = __shfl_xor_sync(0xffffffff, s.max, d), q = __shfl_xor_sync(0xffffffff, s.sum, d);
    const float top = fmaxf(s.max, m), c = top == -INFINITY ? 0.f : top;
    s.sum = s.sum * exp2_fast((s.max - c) * scale) + q * exp2_fast((m - c) * scale);
    s.max = top;
    s.target = fmaxf(s.target, __shfl_xor_sync(0xffffffff, s.target, d));  // -inf where another lane holds it
  }
}

__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    logprob_fwd(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_w,
                const int* __restrict__ target_R, float* __restrict__ part_S3R, LogprobWork work, int rows,
                int vocab, int k_blocks, float scale) {
  NOVA_SHARED_MEMORY(LogprobSmem, s);
  const uint32_t rank = cluster_rank();
  const int cluster = blockIdx.x / 2, clusters = gridDim.x / 2;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kDepth; ++i) {
      mbar_init(&s.full[i], 1);
      mbar_init(&s.empty[i], 4);
    }  // 2 warpgroups x 2 CTAs
    mbar_init_fence();
  }
  cluster_sync();
  const int group = warpgroup_index();
  if (group == 0) {
    reg_dealloc<24>();
    if (threadIdx.x < 32 && elect_one()) {
      Ring<kDepth> ring;
      for (int item = cluster; item < work.count(); item += clusters) {
        int pair, split, v0, v1;
        work.at(item, pair, split, v0, v1);
        for (int v = v0; v < v1; ++v)
          for (int k = 0; k < k_blocks; ++k, ring.next()) {
            mbar_wait(&s.empty[ring.stage], ring.phase ^ 1);  // both CTAs have let go of this stage
            mbar_arrive_expect_tx(&s.full[ring.stage], kXBytes + 2 * kWHalfBytes);
            tma_load_2d(s.x[ring.stage], &map_x, &s.full[ring.stage], k * kK, (2 * pair + rank) * kM);
            tma_load_2d_multicast(s.w[ring.stage][rank], &map_w, &s.full[ring.stage], k * kK,
                                  v * kN + rank * kHalfN, 3);
          }
      }
    }
    __syncwarp();
  } else {
    reg_alloc<240>();
    const int wg = group - 1, tid = threadIdx.x % 128;
    Ring<kDepth> ring;
    float z0[kHalfN / 2], z1[kHalfN / 2];
    for (int item = cluster; item < work.count(); item += clusters) {
      int pair, split, v0, v1;
      work.at(item, pair, split, v0, v1);
      const int row = (2 * pair + rank) * kM + wg * 64 + tid / 32 * 16 + tid % 32 / 4;
      const int t0 = row < rows ? target_R[row] : -1, t1 = row + 8 < rows ? target_R[row + 8] : -1;
      RowState top{-INFINITY, 0.f, -INFINITY}, bottom = top;
      for (int v = v0; v < v1; ++v) {
        int previous = -1;
        for (int k = 0; k < k_blocks; ++k, ring.next()) {
          mbar_wait(&s.full[ring.stage], ring.phase);
          const uint64_t x = desc_k_major(s.x[ring.stage] + wg * 64 * 128),
                         w = desc_k_major(s.w[ring.stage][0]);
          keep(z0);
          keep(z1);
          wgmma_fence();
#pragma unroll
          for (int kk = 0; kk < kK / 16; ++kk) {
            Wgmma<kHalfN, 0, 0>::ss(z0, x + kk * kAdvK16_KMajor, w + kk * kAdvK16_KMajor, (k | kk) != 0);
            Wgmma<kHalfN, 0, 0>::ss(z1, x + kk * kAdvK16_KMajor, w + (kWHalfBytes >> 4) + kk * kAdvK16_KMajor,
                                    (k | kk) != 0);
          }
          wgmma_commit();
          wgmma_wait<1>();
          if (previous >= 0 && tid < 2) mbar_arrive_cluster(&s.empty[previous], tid);
          previous = ring.stage;
        }
        wgmma_wait<0>();
        keep(z0);
        keep(z1);
        if (tid < 2) mbar_arrive_cluster(&s.empty[previous], tid);
        const int col = v * kN + 2 * (tid % 4);
        if ((v + 1) * kN > vocab) {
          mask_tail(z0, col, vocab);
          mask_tail(z1, col + kHalfN, vocab);
        }
        const bool hit = static_cast<unsigned>(t0 - v * kN) < kN || static_cast<unsigned>(t1 - v * kN) < kN;
        if (__any_sync(0xffffffff, hit)) {
          pick_target(z0, col, t0, t1, top, bottom);
          pick_target(z1, col + kHalfN, t0, t1, top, bottom);
        }
        fold(z0, top, bottom, scale);
        fold(z1, top, bottom, scale);
      }
      merge_lanes(top, scale);
      merge_lanes(bottom, scale);
      if (tid % 4 == 0) {
        float* out = part_S3R + static_cast<int64_t>(split) * 3 * rows;
        if (row < rows) {
          out[row] = top.max;
          out[rows + row] = top.sum;
          out[2 * rows + row] = top.target;
        }
        if (row + 8 < rows) {
          out[row + 8] = bottom.max;
          out[rows + row + 8] = bottom.sum;
          out[2 * rows + row + 8] = bottom.target;
        }
      }
    }
  }
  cluster_sync();  // a CTA may not leave while its peer can still write its smem or barriers
}

}  // namespace nova
