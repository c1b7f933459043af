// packed_attention forward for sm_90a: out = softmax(scale Q K^T) V and its log-sum-exp, base 2.
//
// A tile is 64 rows per consumer warpgroup x 128 keys. S(n) = Q K(n)^T and O += P(n - 1) V(n - 1) are issued
// together; the exponentials of S(n) run under the second, and under the products of the other warpgroups,
// which take turns at issuing (ping-pong). Registers per thread: S 64, P 32, O H / 2.
#pragma once
#include "cuda/packed_attention/parts.cuh"

namespace nova {

template <int H>
struct ForwardTile {
  static constexpr int kConsumers = H == 128 ? 2 : 3;
  static constexpr int kRows = 64 * kConsumers, kThreads = 128 * (kConsumers + 1);
  static constexpr int kStages = H == 128 ? 2 : 4;
};
template <int H>
struct alignas(1024) ForwardSmem {
  uint8_t q[kTileBytes<H, ForwardTile<H>::kRows>];
  uint8_t k[ForwardTile<H>::kStages][kTileBytes<H, kKeys>], v[ForwardTile<H>::kStages][kTileBytes<H, kKeys>];
  uint8_t staging[ForwardTile<H>::kRows / 16][kTileBytes<H, 16>];
  uint64_t q_full, q_empty;
  uint64_t k_full[ForwardTile<H>::kStages], k_empty[ForwardTile<H>::kStages];
  uint64_t v_full[ForwardTile<H>::kStages], v_empty[ForwardTile<H>::kStages];
};
template <int H>
constexpr int kForwardSmemBytes = sizeof(ForwardSmem<H>) + 1024;
static_assert(kForwardSmemBytes<64> <= 227 * 1024 && kForwardSmemBytes<128> <= 227 * 1024);

struct ForwardArguments {
  const QueryTile* tiles;
  int items;
  AttentionShape shape;
  __nv_bfloat16* out_TNH;
  float* lse2;  // see AttentionShape
  float scale_log2;
};

// -inf where a key is below the range or, on the diagonal, behind the row's token.
template <int N>
NOVA_DEV void mask_scores(float (&z)[N / 2], int first_key, int lowest, int upper_last, int lower_last) {
#pragma unroll
  for (int i = 0; i < N / 2; i += 4)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int key = first_key + 2 * i + e;
      if (key < lowest || key > upper_last) z[i + e] = -INFINITY;
      if (key < lowest || key > lower_last) z[i + 2 + e] = -INFINITY;
    }
}

// Running maximum of a row (of all its lanes) and sum of exponentials (of this lane's columns).
struct Softmax {
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};

  // z -> exp2(scale (z - max)); factor: what earlier sums and outputs must be multiplied by.
  template <int C>
  NOVA_DEV void step(float (&z)[C], float scale, float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m = max[r];
#pragma unroll
      for (int i = 0; i < C; i += 4) m = fmaxf(m, fmaxf(z[i + 2 * r], z[i + 2 * r + 1]));
      m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 1));
      m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 2));
      const float c = m == -INFINITY ? 0.f : m * scale;  // no key yet: -inf - -inf would be NaN
      factor[r] = exp2_fast(fmaf(max[r], scale, -c));
      max[r] = m;
      float a = 0.f, b = 0.f;
#pragma unroll
      for (int i = 0; i < C; i += 4) {
        z[i + 2 * r] = exp2_fast(fmaf(z[i + 2 * r], scale, -c));
        z[i + 2 * r + 1] = exp2_fast(fmaf(z[i + 2 * r + 1], scale, -c));
        a += z[i + 2 * r];
        b += z[i + 2 * r + 1];
      }
      sum[r] = fmaf(sum[r], factor[r], a + b);
    }
  }
};

template <int H>
NOVA_DEV void forward_producer(ForwardSmem<H>& s, const CUtensorMap& map_q, const CUtensorMap& map_k,
                               const CUtensorMap& map_v, const ForwardArguments& a) {
  Ring<ForwardTile<H>::kStages> ring;
  const int packs = a.shape.packs();
  uint32_t q_phase = 1;
  for (int round = 0, item; (item = item_of(round, blockIdx.x, gridDim.x)) < a.items; ++round, q_phase ^= 1) {
    const QueryTile t = a.tiles[item / packs];
    const KeyTiles tiles(t);
    const int pack = item % packs, kv_head = a.shape.kv_head(pack);
    mbar_wait(&s.q_empty, q_phase);
    mbar_arrive_expect_tx(&s.q_full, sizeof s.q);
    load_rows<H, ForwardTile<H>::kRows>(s.q, map_q, &s.q_full, a.shape.head(pack, 0), t.q_begin);
    for (int n = 0; n < tiles.all; ++n, ring.next()) {
      const int key = tiles.first_key(t, n);
      mbar_wait(&s.k_empty[ring.stage], ring.phase ^ 1);
      mbar_arrive_expect_tx(&s.k_full[ring.stage], sizeof s.k[0]);
      load_rows<H, kKeys>(s.k[ring.stage], map_k, &s.k_full[ring.stage], kv_head, key);
      mbar_wait(&s.v_empty[ring.stage], ring.phase ^ 1);
      mbar_arrive_expect_tx(&s.v_full[ring.stage], sizeof s.v[0]);
      load_rows<H, kKeys>(s.v[ring.stage], map_v, &s.v_full[ring.stage], kv_head, key);
    }
  }
}

// Warpgroups issue their products in turn: named barrier 2 + w is warpgroup w's turn.
template <int CONSUMERS>
NOVA_DEV void take_turn(int wg) {
  bar_sync(2 + wg, 256);
}
template <int CONSUMERS>
NOVA_DEV void pass_turn(int wg) {
  bar_arrive(2 + (wg + 1) % CONSUMERS, 256);
}

// A warpgroup whose rows are all behind the segment's end leaves the matrix unit and the exponentials to the
// others; it takes its turns and gives buffers back as they do.
template <int H>
NOVA_DEV void forward_skip(ForwardSmem<H>& s, Ring<ForwardTile<H>::kStages>& ring, int num_tiles, int wg) {
  for (int n = 0; n < num_tiles; ++n, ring.next()) {
    mbar_wait(&s.k_full[ring.stage], ring.phase);
    take_turn<ForwardTile<H>::kConsumers>(wg);
    pass_turn<ForwardTile<H>::kConsumers>(wg);
    release(&s.k_empty[ring.stage]);
    mbar_wait(&s.v_full[ring.stage], ring.phase);
    release(&s.v_empty[ring.stage]);
  }
  release(&s.q_empty);
}

template <int H>
NOVA_DEV void forward_consumer(ForwardSmem<H>& s, const ForwardArguments& a, int wg) {
  constexpr int kRows = ForwardTile<H>::kRows, kConsumers = ForwardTile<H>::kConsumers;
  const int lane = threadIdx.x % 32, warp_row = wg * 64 + threadIdx.x % 128 / 32 * 16;
  const int row = warp_row + lane / 4, col = 2 * (lane % 4), packs = a.shape.packs();
  const uint8_t* q = s.q + wg * 64 * kPanelRowBytes;
  Ring<ForwardTile<H>::kStages> ring;
  uint32_t q_phase = 0;
  if (wg == kConsumers - 1) pass_turn<kConsumers>(wg);  // warpgroup 0 begins
  for (int round = 0, item; (item = item_of(round, blockIdx.x, gridDim.x)) < a.items; ++round, q_phase ^= 1) {
    const QueryTile t = a.tiles[item / packs];
    const KeyTiles tiles(t);
    const int upper = a.shape.token(t.q_begin, row), lower = a.shape.token(t.q_begin, row + 8);
    float z[kKeys / 2], o[H / 2], factor[2];
    uint32_t p[kKeys / 16][4];
    Softmax soft;
    mbar_wait(&s.q_full, q_phase);
    if (a.shape.token(t.q_begin, wg * 64) >= t.q_end) {
      forward_skip<H>(s, ring, tiles.all, wg);
      continue;
    }
    mbar_wait(&s.k_full[ring.stage], ring.phase);
    take_turn<kConsumers>(wg);
    wgmma_fence();
    multiply_rows<H, kRows, kKeys>(z, q, s.k[ring.stage]);
    wgmma_commit();
    pass_turn<kConsumers>(wg);
    wgmma_wait<0>();
    keep(z);
    release(&s.k_empty[ring.stage]);
    mask_scores<kKeys>(z, tiles.first_key(t, 0) + col, t.own_begin, upper, lower);
    soft.step(z, a.scale_log2, factor);
    pack_operand<kKeys>(z, p);
    for (int n = 1; n < tiles.all; ++n) {
      const Ring<ForwardTile<H>::kStages> last = ring;
      ring.next();
      mbar_wait(&s.k_full[ring.stage], ring.phase);
      mbar_wait(&s.v_full[last.stage], last.phase);
      take_turn<kConsumers>(wg);
      keep(o);
      wgmma_fence();
      multiply_rows<H, kRows, kKeys>(z, q, s.k[ring.stage]);
      wgmma_commit();
      weigh_rows<H, kKeys>(o, p, s.v[last.stage], n != 1);
      wgmma_commit();
      pass_turn<kConsumers>(wg);
      wgmma_wait<1>();
      keep(z);
      release(&s.k_empty[ring.stage]);
      if (tiles.masked(t, n)) {
        const bool causal = tiles.diagonal(t, n);
        mask_scores<kKeys>(z, tiles.first_key(t, n) + col, tiles.lowest_key(t, n), causal ? upper : t.q_end,
                           causal ? lower : t.q_end);
      }
      soft.step(z, a.scale_log2, factor);
      order_after(soft.sum[0] + soft.sum[1], smem_addr(&s));
      wgmma_wait<0>();
      keep(o);
      release(&s.v_empty[last.stage]);
#pragma unroll
      for (int e = 0; e < H / 2; ++e) o[e] *= factor[e / 2 % 2];
      pack_operand<kKeys>(z, p);
    }
    release(&s.q_empty);  // the products with Q have finished
    mbar_wait(&s.v_full[ring.stage], ring.phase);
    keep(o);
    wgmma_fence();
    weigh_rows<H, kKeys>(o, p, s.v[ring.stage], tiles.all != 1);
    wgmma_commit();
    wgmma_wait<0>();
    keep(o);
    release(&s.v_empty[ring.stage]);
    ring.next();
    const int pack = item % packs;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = soft.sum[r];
      sum += __shfl_xor_sync(0xffffffff, sum, 1);
      sum += __shfl_xor_sync(0xffffffff, sum, 2);
      factor[r] = 1.f / sum;
      if ((r == 0 ? upper : lower) < t.q_end && lane % 4 == 0)
        a.lse2[a.shape.scalar(pack, t.q_begin, row + 8 * r)] = soft.max[r] * a.scale_log2 + log2f(sum);
    }
    store_rows<H>(a.out_TNH, o, factor[0], factor[1], s.staging[warp_row / 16], [&](int r) -> int64_t {
      const int token = a.shape.token(t.q_begin, warp_row + r);
      const int64_t head = a.shape.head(pack, warp_row + r);
      return token < t.q_end ? (static_cast<int64_t>(token) * a.shape.heads + head) * H : -1;
    });
  }
}

template <int H>
__global__ void __launch_bounds__(ForwardTile<H>::kThreads, 1)
    attention_fwd(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
                  const __grid_constant__ CUtensorMap map_v, const __grid_constant__ ForwardArguments a) {
  NOVA_SHARED_MEMORY(ForwardSmem<H>, s);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * ForwardTile<H>::kConsumers;
    mbar_init(&s.q_full, 1);
    mbar_init(&s.q_empty, kWarps);
    for (int i = 0; i < ForwardTile<H>::kStages; ++i) {
      mbar_init(&s.k_full[i], 1);
      mbar_init(&s.v_full[i], 1);
      mbar_init(&s.k_empty[i], kWarps);
      mbar_init(&s.v_empty[i], kWarps);
    }
    mbar_init_fence();
  }
  __syncthreads();
  const int group = warpgroup_index();
  if (group == 0) {
    reg_dealloc<ForwardTile<H>::kConsumers == 2 ? 24 : 32>();
    if (threadIdx.x < 32 && elect_one()) forward_producer<H>(s, map_q, map_k, map_v, a);
  } else {
    reg_alloc<ForwardTile<H>::kConsumers == 2 ? 240 : 160>();
    forward_consumer<H>(s, a, group - 1);
  }
}

}  // namespace nova
