// Small kernels that use the instructions one by one. They run in the emulator (self_test.cpp) and on a GPU
// (forms.cu), with equal results.
#pragma once
#include "cuda/common/hopper.cuh"

namespace nova {

struct alignas(1024) Tiles {
  uint8_t a[2 * 64 * 64 * 2];
  uint8_t b[256 * 64 * 2];
  uint8_t out[64 * 64 * 2];
  uint64_t full, empty;
};

// D (64, N) = A (64, 64) B (N, 64)^T; operands as (rows, k) or, MN-major, as (k, rows) in memory.
template <int N, int A_MN, int B_MN>
__global__ void product(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                        float* d, bool a_from_registers) {
  NOVA_SHARED_MEMORY(Tiles, s);
  if (threadIdx.x == 0) {
    mbar_init(&s.full, 1);
    mbar_init_fence();
    mbar_arrive_expect_tx(&s.full, 64 * 64 * 2 + N * 64 * 2);
    tma_load_2d(s.a, &map_a, &s.full, 0, 0);
    if (B_MN) {
      for (int n = 0; n < N; n += 64) tma_load_2d(s.b + n * 128, &map_b, &s.full, n, 0);
    } else {
      tma_load_2d(s.b, &map_b, &s.full, 0, 0);
    }
  }
  __syncthreads();
  mbar_wait(&s.full, 0);
  float z[N / 2];
  const uint64_t a = A_MN ? desc_mn_major(s.a, 64 * 128) : desc_k_major(s.a);
  const uint64_t b = B_MN ? desc_mn_major(s.b, 64 * 128) : desc_k_major(s.b);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    const uint64_t next_b = b + k * (B_MN ? kAdvK16_MNMajor : kAdvK16_KMajor);
    if constexpr (A_MN == 0) {
      if (a_from_registers) {
        uint32_t words[4];
        for (int w = 0; w < 4; ++w) {
          const uint32_t r = row + 8 * (w % 2), c = 16 * k + 8 * (w / 2) + 2 * (lane % 4);
          memcpy(&words[w], s.a + swizzle_128B(r, c / 8) + c % 8 * 2, 4);
        }
        Wgmma<N, 0, B_MN>::rs(z, words, next_b, k > 0);
        continue;
      }
    }
    Wgmma<N, A_MN, B_MN>::ss(z, a + k * (A_MN ? kAdvK16_MNMajor : kAdvK16_KMajor), next_b, k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i)
    d[(row + 8 * (i / 2 % 2)) * N + 8 * (i / 4) + 2 * (lane % 4) + i % 2] = z[i];
}

// A (64, 64) in, out at (row, col) of a larger matrix: through registers, stmatrix and a tensor store.
__global__ void copy(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to,
                     int row, int col) {
  NOVA_SHARED_MEMORY(Tiles, s);
  if (threadIdx.x == 0) {
    mbar_init(&s.full, 1);
    mbar_init_fence();
    mbar_arrive_expect_tx(&s.full, 64 * 64 * 2);
    tma_load_2d(s.a, &from, &s.full, col, row);
  }
  __syncthreads();
  mbar_wait(&s.full, 0);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int c = 0; c < 64; c += 16) {
    uint32_t words[4];
    for (int w = 0; w < 4; ++w) {  // as an accumulator of a product is held
      const uint32_t r = warp * 16 + lane / 4 + 8 * (w % 2), column = c + 8 * (w / 2) + 2 * (lane % 4);
      memcpy(&words[w], s.a + swizzle_128B(r, column / 8) + column % 8 * 2, 4);
    }
    const uint32_t r = warp * 16 + lane % 8 + 8 * (lane / 8 % 2), unit = c / 8 + lane / 16;
    stmatrix_x4(smem_addr(s.out + swizzle_128B(r, unit)), words[0], words[1], words[2], words[3]);
  }
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store_2d(&to, s.out, col, row);
    tma_store_commit();
    tma_store_wait<0>();
  }
}

}  // namespace nova
