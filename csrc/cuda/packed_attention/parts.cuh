// What the kernels of packed_attention share: copies, products, and stores of tiles. A tile of R rows lies in
// shared memory as H / 64 panels of R rows x 128 bytes.
#pragma once
#include "cuda/common/hopper.cuh"
#include "cuda/packed_attention/work.h"

namespace nova {

constexpr int kPanelRowBytes = 128;
template <int H, int ROWS>
constexpr int kTileBytes = ROWS * H * 2;

// Rows of one head, or of a pack of heads, from a map (H, heads, tokens). Tokens below 0 arrive as zeros.
template <int H, int ROWS>
NOVA_DEV void load_rows(uint8_t* to, const CUtensorMap& map, uint64_t* full, int head, int token) {
#pragma unroll
  for (int panel = 0; panel < H / 64; ++panel)
    tma_load_3d(to + panel * ROWS * kPanelRowBytes, &map, full, 64 * panel, head, token);
}

// One lane per warp gives a buffer back. Call it where the warp is together.
NOVA_DEV void release(uint64_t* empty) {
  if (threadIdx.x % 32 == 0) mbar_arrive(empty);
}

// D (64 x N) = A B^T over the head dim; A: 64 rows of a tile of A_ROWS, B: a tile of N rows.
template <int H, int A_ROWS, int N>
NOVA_DEV void multiply_rows(float (&d)[N / 2], const uint8_t* a, const uint8_t* b) {
  const uint64_t from_a = desc_k_major(a), from_b = desc_k_major(b);
#pragma unroll
  for (int k = 0; k < H / 16; ++k)
    Wgmma<N, 0, 0>::ss(d, from_a + k / 4 * (A_ROWS * kPanelRowBytes >> 4) + k % 4 * kAdvK16_KMajor,
                       from_b + k / 4 * (N * kPanelRowBytes >> 4) + k % 4 * kAdvK16_KMajor, k != 0);
}

// D (64 x H) = P X + (accumulate ? D : 0); P: 64 x ROWS in registers, X: a tile of ROWS rows.
template <int H, int ROWS>
NOVA_DEV void weigh_rows(float (&d)[H / 2], const uint32_t (&p)[ROWS / 16][4], const uint8_t* x,
                         int accumulate) {
  const uint64_t from_x = desc_mn_major(x, ROWS * kPanelRowBytes);
#pragma unroll
  for (int k = 0; k < ROWS / 16; ++k)
    Wgmma<H, 0, 1>::rs(d, p[k], from_x + k * kAdvK16_MNMajor, accumulate | (k != 0));
}

// An accumulator (64 x N) as the left operand of a product: no shuffles, the layouts agree.
template <int N>
NOVA_DEV void pack_operand(const float (&z)[N / 2], uint32_t (&p)[N / 16][4]) {
#pragma unroll
  for (int k = 0; k < N / 16; ++k)
#pragma unroll
    for (int e = 0; e < 4; ++e) p[k][e] = pack_bf16(z[8 * k + 2 * e], z[8 * k + 2 * e + 1]);
}

// A warp's 16 rows x H of an accumulator (rows l / 4 and l / 4 + 8 in lane l) times a factor per row, as bf16
// to memory, through 16 rows of shared memory that are the warp's own: whole lines of 16 bytes per lane.
// element(r): where row r begins in `to`, or negative: not stored.
template <int H, class Element>
NOVA_DEV void store_rows(__nv_bfloat16* to, const float (&d)[H / 2], float upper, float lower,
                         uint8_t* staging, const Element& element) {
  constexpr int kUnits = H / 8;  // of 16 bytes per row; unit u of row r stands at u ^ (r % 8): no bank twice
  const int lane = threadIdx.x % 32;
  __syncwarp();  // what stood there has been read
#pragma unroll
  for (int j = 0; j < H / 16; ++j) {
    const int row = lane % 8 + lane / 8 % 2 * 8, unit = 2 * j + lane / 16;
    stmatrix_x4(smem_addr(staging + row * (2 * H) + ((unit ^ (row % 8)) << 4)),
                pack_bf16(d[8 * j] * upper, d[8 * j + 1] * upper),
                pack_bf16(d[8 * j + 2] * lower, d[8 * j + 3] * lower),
                pack_bf16(d[8 * j + 4] * upper, d[8 * j + 5] * upper),
                pack_bf16(d[8 * j + 6] * lower, d[8 * j + 7] * lower));
  }
  __syncwarp();  // what stands there is whole
#pragma unroll
  for (int pass = 0; pass < kUnits / 2; ++pass) {
    const int row = pass * (32 / kUnits) + lane / kUnits, unit = lane % kUnits;
    const int64_t at = element(row);
    if (at >= 0)
      *reinterpret_cast<uint4*>(to + at + unit * 8) =
          *reinterpret_cast<const uint4*>(staging + row * (2 * H) + ((unit ^ (row % 8)) << 4));
  }
}

}  // namespace nova
