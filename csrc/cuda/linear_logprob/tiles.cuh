// Tiles of logits z = x w^T, M128 x N256, that live in registers only: what the two kernels with products
// share.
//
// Cluster of 2 CTAs along the rows: both need the same tile of w, so each loads half of it and multicasts
// that to both. Warpgroup 0 feeds a ring of 4 stages by TMA; warpgroups 1 and 2 own 64 x 256 of the tile
// each.
//
// Barriers, per stage. full: 1 arrival (this CTA's producer, with the bytes of its x tile and of BOTH halves
// of w), waited for by both consumers with the ring's phase. empty: 4 arrivals (2 consumers x 2 CTAs, because
// the halves land in both), waited for by the producer with the other phase. Producer and consumers walk the
// same items, tiles and steps.
#pragma once
#include "cuda/common/hopper.cuh"
#include "cuda/linear_logprob/work.h"

namespace nova {

constexpr int kDepth = 4, kThreads = 384;
// Registers per thread. A block starts with 168 for each of its 384 threads, and a warpgroup gets more only
// as others give theirs back: what the roles have together may not exceed that, or the block waits forever.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168, "setmaxnreg would never return");
constexpr int kHalfN = kN / 2;
constexpr int kXBytes = kM * kK * 2, kWHalfBytes = kHalfN * kK * 2;
constexpr int kBoxBytes = 64 * 64 * 2;  // one box of what leaves; two per consumer take turns
struct alignas(1024) LogprobSmem {
  uint8_t x[kDepth][kXBytes];
  uint8_t w[kDepth][2][kWHalfBytes];
  uint8_t out[2][2][kBoxBytes];
  uint64_t full[kDepth], empty[kDepth];
};
constexpr int kLogprobSmemBytes = sizeof(LogprobSmem) + 1024;
static_assert(kLogprobSmemBytes <= 227 * 1024, "over the 227 KB a block can have");

NOVA_DEV void init_barriers(LogprobSmem& s) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < kDepth; ++i) {
      mbar_init(&s.full[i], 1);
      mbar_init(&s.empty[i], 4);
    }
    mbar_init_fence();
  }
  cluster_sync();
}

// One thread. first_column: of w, where column tile 0 starts.
NOVA_DEV void produce(LogprobSmem& s, const CUtensorMap& map_x, const CUtensorMap& map_w,
                      const LogprobWork& work, int first_column, int k_blocks) {
  const int rank = static_cast<int>(cluster_rank());
  Ring<kDepth> ring;
  for (int number = blockIdx.x / 2; number < work.count(); number += gridDim.x / 2) {
    const LogprobItem item = work.at(number);
    for (int v = item.v_begin; v < item.v_end; ++v) {
      for (int k = 0; k < k_blocks; ++k, ring.next()) {
        mbar_wait(&s.empty[ring.stage], ring.phase ^ 1);  // both CTAs have let go of this stage
        mbar_arrive_expect_tx(&s.full[ring.stage], kXBytes + 2 * kWHalfBytes);
        tma_load_2d(s.x[ring.stage], &map_x, &s.full[ring.stage], k * kK, (2 * item.pair + rank) * kM);
        tma_load_2d_multicast(s.w[ring.stage][rank], &map_w, &s.full[ring.stage], k * kK,
                              first_column + v * kN + rank * kHalfN, 3);
      }
    }
  }
}

// z = this consumer's 64 rows of x times all 256 columns of w, over all of the depth. One group of products
// stays in flight, so a stage is handed back one step late, to both CTAs: by threads 0 and 1.
NOVA_DEV void multiply(LogprobSmem& s, float (&z)[kN / 2], int consumer, int k_blocks, Ring<kDepth>& ring) {
  const int thread = threadIdx.x % 128;
  int previous = -1;
  for (int k = 0; k < k_blocks; ++k, ring.next()) {
    mbar_wait(&s.full[ring.stage], ring.phase);
    const uint64_t x = desc_k_major(s.x[ring.stage] + consumer * (kXBytes / 2));
    const uint64_t w = desc_k_major(s.w[ring.stage][0]);
    keep(z);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kK / 16; ++kk)
      Wgmma<kN, 0, 0>::ss(z, x + kk * kAdvK16_KMajor, w + kk * kAdvK16_KMajor, (k | kk) != 0);
    wgmma_commit();
    wgmma_wait<1>();
    if (previous >= 0 && thread < 2) mbar_arrive_cluster(&s.empty[previous], thread);
    previous = static_cast<int>(ring.stage);
  }
  wgmma_wait<0>();
  keep(z);
  if (thread < 2) mbar_arrive_cluster(&s.empty[previous], thread);
}

// Where a thread's values stand: z[i] is row tile_row + thread_row + 8 row_of(i), column first_column +
// column_of(i). Columns are compared as distances from first_column, which are constants: no registers.
NOVA_DEV int tile_row(const LogprobItem& item, int consumer) {
  return (2 * item.pair + static_cast<int>(cluster_rank())) * kM + consumer * 64;
}
NOVA_DEV int thread_row() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }
NOVA_DEV int first_column(int tile) { return tile * kN + 2 * (threadIdx.x % 4); }
NOVA_DEV constexpr int row_of(int i) { return i / 2 % 2; }
NOVA_DEV constexpr int column_of(int i) { return 8 * (i / 4) + i % 2; }

// Whether a lane of the warp looks for a column of this tile: about one tile in 30 at V = 128256.
NOVA_DEV bool any_inside(int tile, const int (&wanted)[2]) {
  const bool inside = static_cast<unsigned>(wanted[0] - tile * kN) < static_cast<unsigned>(kN) ||
                      static_cast<unsigned>(wanted[1] - tile * kN) < static_cast<unsigned>(kN);
  return __any_sync(0xffffffff, inside);
}

// NormHead: columns divided by the length of their row of w. The array goes on to the end of the last tile.
// Behind `opaque`, or the compiler would keep the 64 values of a first call for a second one.
NOVA_DEV void scale_columns(float (&z)[kN / 2], const float* inverse_norm_V, int column) {
  const uint64_t address = opaque(reinterpret_cast<uint64_t>(inverse_norm_V + column));
  const float2* pairs = reinterpret_cast<const float2*>(address);
#pragma unroll
  for (int i = 0; i < kN / 2; i += 4) {
    const float2 scale = __ldg(pairs + i);
    z[i] *= scale.x;
    z[i + 1] *= scale.y;
    z[i + 2] *= scale.x;
    z[i + 3] *= scale.y;
  }
}

NOVA_DEV void mask_tail(float (&z)[kN / 2], int column, int vocab) {
#pragma unroll
  for (int i = 0; i < kN / 2; ++i)
    if (column_of(i) >= vocab - column) z[i] = -INFINITY;
}

// This consumer's 64 x 256 values to (row, column) of a matrix, rounded to bf16. Rows and columns outside the
// matrix are left out by the copy. Named barriers 1 and 2.
NOVA_DEV void store_tile(LogprobSmem& s, const float (&z)[kN / 2], const CUtensorMap& map, int consumer,
                         int row, int column) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const uint32_t r = warp * 16 + lane % 8 + 8 * (lane / 8 % 2), u = lane / 16;  // the line this lane names
#pragma unroll
  for (int box = 0; box < kN / 64; ++box) {
    uint8_t* out = s.out[consumer][box % 2];
    if (threadIdx.x % 128 == 0) tma_store_wait_read<1>();  // the copy before the last one has read its box
    bar_sync(1 + consumer, 128);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const float* d = z + 32 * box + 4 * j;
      stmatrix_x4(smem_addr(out) + swizzle_128B(r, u + j), pack_bf16(d[0], d[1]), pack_bf16(d[2], d[3]),
                  pack_bf16(d[4], d[5]), pack_bf16(d[6], d[7]));
    }
    fence_proxy_async();
    bar_sync(1 + consumer, 128);
    if (threadIdx.x % 128 == 0) {
      tma_store_2d(&map, out, column + 64 * box, row);
      tma_store_commit();
    }
  }
}

// Shared memory must outlive the copies out of it, and a CTA may not leave while its peer can still write to
// its stages or arrive on its barriers.
NOVA_DEV void leave_together() {
  if (threadIdx.x >= 128 && threadIdx.x % 128 == 0) tma_store_wait<0>();
  __syncwarp();
  cluster_sync();
}

}  // namespace nova
