// packed_attention backward, dQ of a query tile for sm_90a: the forward's list and loop with three products.
//   S = Q K^T    dP = dO V^T    dQ += dS K,   dS = P (dP - delta),   P = exp2(scale S - lse)
// dS stays in registers; K is read twice from the same shared memory, by rows for S and by columns for dQ.
// The exponentials run under dP, dQ under the next S. Registers per thread: S 64, dP 64, dS 32, dQ H / 2.
#pragma once
#include "cuda/packed_attention/parts.cuh"

namespace nova {

template <int H>
struct DqTile {
  static constexpr int kRows = 128, kThreads = 384, kStages = H == 128 ? 2 : 4;
};
template <int H>
struct alignas(1024) DqSmem {
  uint8_t q[kTileBytes<H, DqTile<H>::kRows>], d_out[kTileBytes<H, DqTile<H>::kRows>];
  uint8_t k[DqTile<H>::kStages][kTileBytes<H, kKeys>], v[DqTile<H>::kStages][kTileBytes<H, kKeys>];
  uint8_t staging[DqTile<H>::kRows / 16][kTileBytes<H, 16>];
  uint64_t q_full, q_empty, full[DqTile<H>::kStages], empty[DqTile<H>::kStages];
};
template <int H>
constexpr int kDqSmemBytes = sizeof(DqSmem<H>) + 1024;
static_assert(kDqSmemBytes<64> <= 227 * 1024 && kDqSmemBytes<128> <= 227 * 1024);

struct DqArguments {
  const QueryTile* tiles;
  int items;
  AttentionShape shape;
  const float *lse2, *delta;  // see AttentionShape
  __nv_bfloat16* dq_TNH;
  float scale, scale_log2;
};

template <int H>
NOVA_DEV void dq_producer(DqSmem<H>& s, const CUtensorMap& map_q, const CUtensorMap& map_do,
                          const CUtensorMap& map_k, const CUtensorMap& map_v, const DqArguments& a) {
  Ring<DqTile<H>::kStages> ring;
  const int packs = a.shape.packs();
  uint32_t q_phase = 1;
  for (int round = 0, item; (item = item_of(round, blockIdx.x, gridDim.x)) < a.items; ++round, q_phase ^= 1) {
    const QueryTile t = a.tiles[item / packs];
    const KeyTiles tiles(t);
    const int pack = item % packs, head = a.shape.head(pack, 0), kv_head = a.shape.kv_head(pack);
    mbar_wait(&s.q_empty, q_phase);
    mbar_arrive_expect_tx(&s.q_full, sizeof s.q + sizeof s.d_out);
    load_rows<H, DqTile<H>::kRows>(s.q, map_q, &s.q_full, head, t.q_begin);
    load_rows<H, DqTile<H>::kRows>(s.d_out, map_do, &s.q_full, head, t.q_begin);
    for (int n = 0; n < tiles.all; ++n, ring.next()) {
      const int key = tiles.first_key(t, n);
      mbar_wait(&s.empty[ring.stage], ring.phase ^ 1);
      mbar_arrive_expect_tx(&s.full[ring.stage], sizeof s.k[0] + sizeof s.v[0]);
      load_rows<H, kKeys>(s.k[ring.stage], map_k, &s.full[ring.stage], kv_head, key);
      load_rows<H, kKeys>(s.v[ring.stage], map_v, &s.full[ring.stage], kv_head, key);
    }
  }
}

template <int H>
NOVA_DEV void dq_consumer(DqSmem<H>& s, const DqArguments& a, int wg) {
  constexpr int kRows = DqTile<H>::kRows;
  const int lane = threadIdx.x % 32, warp_row = wg * 64 + threadIdx.x % 128 / 32 * 16;
  const int row = warp_row + lane / 4, col = 2 * (lane % 4), packs = a.shape.packs();
  Ring<DqTile<H>::kStages> ring;
  uint32_t q_phase = 0;
  float z[kKeys / 2], dp[kKeys / 2], dq[H / 2];
  uint32_t ds[kKeys / 16][4];
  for (int round = 0, item; (item = item_of(round, blockIdx.x, gridDim.x)) < a.items; ++round, q_phase ^= 1) {
    const QueryTile t = a.tiles[item / packs];
    const KeyTiles tiles(t);
    const int pack = item % packs;
    const int token[2] = {a.shape.token(t.q_begin, row), a.shape.token(t.q_begin, row + 8)};
    float lse2[2], delta[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {  // rows behind the tile's tokens: anything finite, they are not stored
      const int64_t at = a.shape.scalar(pack, t.q_begin, row + 8 * r);
      lse2[r] = token[r] < t.q_end ? a.lse2[at] : 0.f;
      delta[r] = token[r] < t.q_end ? a.delta[at] : 0.f;
    }
    mbar_wait(&s.q_full, q_phase);
    if (a.shape.token(t.q_begin, wg * 64) >= t.q_end) {  // no row of this warpgroup is the segment's
      for (int n = 0; n < tiles.all; ++n, ring.next()) {
        mbar_wait(&s.full[ring.stage], ring.phase);
        release(&s.empty[ring.stage]);
      }
      release(&s.q_empty);
      continue;
    }
    int previous = -1;
    for (int n = 0; n < tiles.all; ++n, ring.next()) {
      const int stage = ring.stage;
      mbar_wait(&s.full[stage], ring.phase);
      wgmma_fence();
      multiply_rows<H, kRows, kKeys>(z, s.q + wg * 64 * kPanelRowBytes, s.k[stage]);
      wgmma_commit();
      wgmma_wait<1>();  // dQ of the tile before has finished under S: ds and its stage are free
      keep(dq);
      if (previous >= 0) release(&s.empty[previous]);
      previous = stage;
      wgmma_fence();
      multiply_rows<H, kRows, kKeys>(dp, s.d_out + wg * 64 * kPanelRowBytes, s.v[stage]);
      wgmma_commit();
      wgmma_wait<1>();
      keep(z);
#pragma unroll
      for (int e = 0; e < kKeys / 2; ++e) z[e] = exp2_fast(fmaf(z[e], a.scale_log2, -lse2[e / 2 % 2]));
      if (tiles.masked(t, n)) {  // after the exponential, which may overflow where masked
        const int key0 = tiles.first_key(t, n) + col, lowest = tiles.lowest_key(t, n);
        const bool causal = tiles.diagonal(t, n);
#pragma unroll
        for (int e = 0; e < kKeys / 2; ++e) {
          const int key = key0 + e / 4 * 8 + e % 2;
          if (key < lowest || (causal && key > token[e / 2 % 2])) z[e] = 0.f;
        }
      }
      order_after(z[0], smem_addr(&s));
      wgmma_wait<0>();
      keep(dp);
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = 8 * k + 2 * e;
          ds[k][e] = pack_bf16(z[i] * (dp[i] - delta[e % 2]), z[i + 1] * (dp[i + 1] - delta[e % 2]));
        }
      wgmma_fence();
      weigh_rows<H, kKeys>(dq, ds, s.k[stage], n != 0);
      wgmma_commit();
    }
    wgmma_wait<0>();
    keep(dq);
    release(&s.empty[previous]);
    release(&s.q_empty);
    store_rows<H>(a.dq_TNH, dq, a.scale, a.scale, s.staging[warp_row / 16], [&](int r) -> int64_t {
      const int at = a.shape.token(t.q_begin, warp_row + r);
      const int64_t head = a.shape.head(pack, warp_row + r);
      return at < t.q_end ? (static_cast<int64_t>(at) * a.shape.heads + head) * H : -1;
    });
  }
}

template <int H>
__global__ void __launch_bounds__(DqTile<H>::kThreads, 1)
    attention_bwd_dq(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_do,
                     const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v,
                     const __grid_constant__ DqArguments a) {
  NOVA_SHARED_MEMORY(DqSmem<H>, s);
  if (threadIdx.x == 0) {
    mbar_init(&s.q_full, 1);
    mbar_init(&s.q_empty, 8);  // warps
    for (int i = 0; i < DqTile<H>::kStages; ++i) {
      mbar_init(&s.full[i], 1);
      mbar_init(&s.empty[i], 8);
    }
    mbar_init_fence();
  }
  __syncthreads();
  const int group = warpgroup_index();
  if (group == 0) {
    reg_dealloc<24>();
    if (threadIdx.x < 32 && elect_one()) dq_producer<H>(s, map_q, map_do, map_k, map_v, a);
  } else {
    reg_alloc<240>();
    dq_consumer<H>(s, a, group - 1);
  }
}

}  // namespace nova
