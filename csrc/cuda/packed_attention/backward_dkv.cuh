// packed_attention backward, dK and dV of a key tile for sm_90a. Four products per query tile:
//   S^T = K Q^T    dP^T = V dO^T    dV += P^T dO    dK += dS^T Q,   dS = P (dP - delta)
// Transposed scores put keys on the rows of the accumulators, so that P^T and dS^T are left operands as they
// stand in registers: nothing goes through shared memory, and nothing is added atomically. All query heads of
// the key head are summed inside the CTA, in a fixed order.
// Where each product is waited for decides the registers: dK of the tile before under S^T, dV under the end
// of its own tile. Live at once: dK, dV (H / 2 each), S^T, dP^T (queries / 2 each), P^T, dS^T (queries / 4).
#pragma once
#include "cuda/packed_attention/parts.cuh"

namespace nova {

template <int H>
struct DkvTile {
  static constexpr int kQueries = 64, kThreads = 384, kStages = H == 128 ? 3 : 4;
};
template <int H>
struct alignas(1024) DkvSmem {
  uint8_t k[kTileBytes<H, kKeys>], v[kTileBytes<H, kKeys>];
  uint8_t q[DkvTile<H>::kStages][kTileBytes<H, DkvTile<H>::kQueries>];
  uint8_t d_out[DkvTile<H>::kStages][kTileBytes<H, DkvTile<H>::kQueries>];
  uint8_t staging[kKeys / 16][kTileBytes<H, 16>];
  float lse2[DkvTile<H>::kStages][DkvTile<H>::kQueries], delta[DkvTile<H>::kStages][DkvTile<H>::kQueries];
  uint64_t kv_full, kv_empty, full[DkvTile<H>::kStages], empty[DkvTile<H>::kStages];
};
template <int H>
constexpr int kDkvSmemBytes = sizeof(DkvSmem<H>) + 1024;
static_assert(kDkvSmemBytes<64> <= 227 * 1024 && kDkvSmemBytes<128> <= 227 * 1024);

struct DkvMaps {
  CUtensorMap q, d_out, k, v, lse2, delta;
};
struct DkvArguments {
  const KeyTile* tiles;
  int items;
  AttentionShape shape;
  int parts;  // of an item; above 1, sums go to the partials (unscaled) instead of dk and dv
  __nv_bfloat16 *dk_TKH, *dv_TKH;
  float *dk_partial_PTKH, *dv_partial_PTKH;
  float scale, scale_log2;
};

template <int H>
NOVA_DEV void dkv_producer(DkvSmem<H>& s, const DkvMaps& maps, const DkvArguments& a) {
  constexpr int kQueries = DkvTile<H>::kQueries;
  Ring<DkvTile<H>::kStages> ring;
  uint32_t kv_phase = 1;
  for (int round = 0, item; (item = item_of(round, blockIdx.x, gridDim.x)) < a.items;
       ++round, kv_phase ^= 1) {
    const KeyTile t = a.tiles[item / a.parts / a.shape.kv_heads];
    const QueryTiles tiles(t, kQueries >> a.shape.pack_shift);
    const int kv_head = item / a.parts % a.shape.kv_heads, packs = a.shape.packs_per_kv_head();
    mbar_wait(&s.kv_empty, kv_phase);
    mbar_arrive_expect_tx(&s.kv_full, sizeof s.k + sizeof s.v);
    load_rows<H, kKeys>(s.k, maps.k, &s.kv_full, kv_head, t.k_begin);
    load_rows<H, kKeys>(s.v, maps.v, &s.kv_full, kv_head, t.k_begin);
    KeySteps step(kv_head * packs, packs, tiles.all, item % a.parts, a.parts);
    for (; step.left > 0; step.next(tiles.all), ring.next()) {
      const int token = tiles.first_query(t, step.tile), head = a.shape.head(step.pack, 0);
      uint64_t* full = &s.full[ring.stage];
      mbar_wait(&s.empty[ring.stage], ring.phase ^ 1);
      mbar_arrive_expect_tx(full, sizeof s.q[0] + sizeof s.d_out[0] + sizeof s.lse2[0] + sizeof s.delta[0]);
      load_rows<H, kQueries>(s.q[ring.stage], maps.q, full, head, token);
      load_rows<H, kQueries>(s.d_out[ring.stage], maps.d_out, full, head, token);
      tma_load_2d(s.lse2[ring.stage], &maps.lse2, full, token * (1 << a.shape.pack_shift), step.pack);
      tma_load_2d(s.delta[ring.stage], &maps.delta, full, token * (1 << a.shape.pack_shift), step.pack);
    }
  }
}

// P^T = 0 where a query is none of these keys' or stands before the key; column c of z is row `col + c` of
// the tile. After the exponential, which may overflow there.
template <int N>
NOVA_DEV void mask_queries(float (&z)[N / 2], const AttentionShape& shape, int first, int lowest, int col,
                           int key) {
#pragma unroll
  for (int e = 0; e < N / 2; ++e) {
    const int query = shape.token(first, col + e / 4 * 8 + e % 2);
    if (query < lowest || query < key + e / 2 % 2 * 8) z[e] = 0.f;
  }
}

// This thread's two rows of the item's sums; four lanes write 32 bytes side by side.
template <int H>
NOVA_DEV void store_partial(const DkvArguments& a, const KeyTile& t, int item, int row, int col,
                            const float (&dk)[H / 2], const float (&dv)[H / 2]) {
  const int part = item % a.parts, kv_head = item / a.parts % a.shape.kv_heads;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = t.k_begin + row + 8 * r;
    if (key >= t.k_end) continue;
    const int64_t at =
        ((static_cast<int64_t>(part) * a.shape.tokens + key) * a.shape.kv_heads + kv_head) * H + col;
#pragma unroll
    for (int j = 0; j < H / 8; ++j) {
      *reinterpret_cast<float2*>(a.dk_partial_PTKH + at + 8 * j) = {dk[4 * j + 2 * r], dk[4 * j + 2 * r + 1]};
      *reinterpret_cast<float2*>(a.dv_partial_PTKH + at + 8 * j) = {dv[4 * j + 2 * r], dv[4 * j + 2 * r + 1]};
    }
  }
}

template <int H>
NOVA_DEV void dkv_consumer(DkvSmem<H>& s, const DkvArguments& a, int wg) {
  constexpr int kQueries = DkvTile<H>::kQueries;
  const int lane = threadIdx.x % 32, warp_row = wg * 64 + threadIdx.x % 128 / 32 * 16;
  const int row = warp_row + lane / 4, col = 2 * (lane % 4);
  Ring<DkvTile<H>::kStages> ring;
  uint32_t kv_phase = 0;
  float dk[H / 2], dv[H / 2], z[kQueries / 2], dp[kQueries / 2];
  uint32_t p[kQueries / 16][4], ds[kQueries / 16][4];
  for (int round = 0, item; (item = item_of(round, blockIdx.x, gridDim.x)) < a.items;
       ++round, kv_phase ^= 1) {
    const KeyTile t = a.tiles[item / a.parts / a.shape.kv_heads];
    const QueryTiles tiles(t, kQueries >> a.shape.pack_shift);
    KeySteps step(0, a.shape.packs_per_kv_head(), tiles.all, item % a.parts, a.parts);
    mbar_wait(&s.kv_full, kv_phase);
    if (t.k_begin + wg * 64 >= t.k_end) {  // no key of this warpgroup is the tile's
      for (; step.left > 0; --step.left, ring.next()) {
        mbar_wait(&s.full[ring.stage], ring.phase);
        release(&s.empty[ring.stage]);
      }
      release(&s.kv_empty);
      continue;
    }
#pragma unroll
    for (int e = 0; e < H / 2; ++e) dk[e] = dv[e] = 0.f;
    int previous = -1;
    for (; step.left > 0; step.next(tiles.all), ring.next()) {
      const int stage = ring.stage, n = step.tile;
      mbar_wait(&s.full[stage], ring.phase);
      wgmma_fence();
      multiply_rows<H, kKeys, kQueries>(z, s.k + wg * 64 * kPanelRowBytes, s.q[stage]);
      wgmma_commit();
      wgmma_wait<1>();  // dK of the tile before has finished under S^T: ds and its stage are free
      keep(dk);
      if (previous >= 0) release(&s.empty[previous]);  // of the step before
      previous = stage;
      wgmma_fence();
      multiply_rows<H, kKeys, kQueries>(dp, s.v + wg * 64 * kPanelRowBytes, s.d_out[stage]);
      wgmma_commit();
      wgmma_wait<1>();
      keep(z);
#pragma unroll
      for (int e = 0; e < kQueries / 2; e += 4) {
        const float2 lse2 = *reinterpret_cast<const float2*>(&s.lse2[stage][2 * e + col]);
        z[e] = exp2_fast(fmaf(z[e], a.scale_log2, -lse2.x));
        z[e + 1] = exp2_fast(fmaf(z[e + 1], a.scale_log2, -lse2.y));
        z[e + 2] = exp2_fast(fmaf(z[e + 2], a.scale_log2, -lse2.x));
        z[e + 3] = exp2_fast(fmaf(z[e + 3], a.scale_log2, -lse2.y));
      }
      if (tiles.masked(t, n)) {
        const int key = n < tiles.own ? t.k_begin + row : -8;  // branches see the whole prefix
        mask_queries<kQueries>(z, a.shape, tiles.first_query(t, n), tiles.lowest_query(t, n), col, key);
      }
      pack_operand<kQueries>(z, p);
      wgmma_fence();
      weigh_rows<H, kQueries>(dv, p, s.d_out[stage], 1);
      wgmma_commit();
      wgmma_wait<1>();
      keep(dp);
#pragma unroll
      for (int e = 0; e < kQueries / 2; e += 4) {
        const float2 delta = *reinterpret_cast<const float2*>(&s.delta[stage][2 * e + col]);
        dp[e] = z[e] * (dp[e] - delta.x);
        dp[e + 1] = z[e + 1] * (dp[e + 1] - delta.y);
        dp[e + 2] = z[e + 2] * (dp[e + 2] - delta.x);
        dp[e + 3] = z[e + 3] * (dp[e + 3] - delta.y);
      }
      pack_operand<kQueries>(dp, ds);
      wgmma_fence();
      weigh_rows<H, kQueries>(dk, ds, s.q[stage], 1);
      wgmma_commit();
      wgmma_wait<1>();  // dV has finished: p is free before the next S^T needs registers
      keep(dv);
    }
    wgmma_wait<0>();
    keep(dk);
    keep(dv);
    __syncwarp();
    if (previous >= 0) release(&s.empty[previous]);
    release(&s.kv_empty);
    if (a.parts > 1) {
      store_partial<H>(a, t, item, row, col, dk, dv);
      continue;
    }
    const auto element = [&](int r) -> int64_t {
      const int key = t.k_begin + warp_row + r, kv_head = item % a.shape.kv_heads;
      return key < t.k_end ? (static_cast<int64_t>(key) * a.shape.kv_heads + kv_head) * H : -1;
    };
    store_rows<H>(a.dk_TKH, dk, a.scale, a.scale, s.staging[warp_row / 16], element);
    store_rows<H>(a.dv_TKH, dv, 1.f, 1.f, s.staging[warp_row / 16], element);
  }
}

// dk and dv of the partials, added in their order; four elements per thread.
constexpr int kSumThreads = 256;
__global__ void __launch_bounds__(kSumThreads) attention_sum_parts(const __grid_constant__ DkvArguments a) {
  const int64_t elements = static_cast<int64_t>(a.shape.tokens) * a.shape.kv_heads * a.shape.head_dim;
  const int64_t at = 4 * (static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x);
  if (at >= elements) return;
  float4 dk = {0.f, 0.f, 0.f, 0.f}, dv = dk;
  for (int part = 0; part < a.parts; ++part) {
    const float4 k = *reinterpret_cast<const float4*>(a.dk_partial_PTKH + part * elements + at);
    const float4 v = *reinterpret_cast<const float4*>(a.dv_partial_PTKH + part * elements + at);
    dk = {dk.x + k.x, dk.y + k.y, dk.z + k.z, dk.w + k.w};
    dv = {dv.x + v.x, dv.y + v.y, dv.z + v.z, dv.w + v.w};
  }
  *reinterpret_cast<uint2*>(a.dk_TKH + at) = {pack_bf16(dk.x * a.scale, dk.y * a.scale),
                                              pack_bf16(dk.z * a.scale, dk.w * a.scale)};
  *reinterpret_cast<uint2*>(a.dv_TKH + at) = {pack_bf16(dv.x, dv.y), pack_bf16(dv.z, dv.w)};
}

template <int H>
__global__ void __launch_bounds__(DkvTile<H>::kThreads, 1)
    attention_bwd_dkv(const __grid_constant__ DkvMaps maps, const __grid_constant__ DkvArguments a) {
  NOVA_SHARED_MEMORY(DkvSmem<H>, s);
  if (threadIdx.x == 0) {
    mbar_init(&s.kv_full, 1);
    mbar_init(&s.kv_empty, 8);  // warps
    for (int i = 0; i < DkvTile<H>::kStages; ++i) {
      mbar_init(&s.full[i], 1);
      mbar_init(&s.empty[i], 8);
    }
    mbar_init_fence();
  }
  __syncthreads();
  const int group = warpgroup_index();
  if (group == 0) {
    reg_dealloc<24>();
    if (threadIdx.x < 32 && elect_one()) dkv_producer<H>(s, maps, a);
  } else {
    reg_alloc<240>();
    dkv_consumer<H>(s, a, group - 1);
  }
}

}  // namespace nova
