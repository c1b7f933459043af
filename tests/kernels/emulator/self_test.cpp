// Small kernels that use the instructions one by one, for test_emulator.py.
#include <cstdio>

#include "forms.cuh"

using namespace nova;

namespace {

CUtensorMap matrix(const void* base, int rows, int cols, int box_rows, int swizzle = 128) {
  CUtensorMap map{
      static_cast<const uint8_t*>(base), 2, 2, swizzle, {cols, rows}, {2, 2 * cols}, {64, box_rows}};
  return map;
}

void broken(int which) {
  NOVA_SHARED_MEMORY(Tiles, s);
  if (threadIdx.x == 0 && which != 0) mbar_init(&s.full, 1);
  __syncthreads();
  if (which == 0 && threadIdx.x == 0) mbar_arrive(&s.full);               // not initialised
  if (which == 1 && threadIdx.x < 2) mbar_arrive_expect_tx(&s.full, 16);  // two arrivals, one allowed
  if (which == 2) mbar_wait(&s.full, 0);                                  // nobody arrives
  if (which == 3 && threadIdx.x < 64) __syncthreads();                    // half of the threads
  float z[32];
  if (which == 4) Wgmma<64, 0, 0>::ss(z, desc_k_major(s.a + threadIdx.x / 64 * 1024), desc_k_major(s.b), 0);
  if (which == 5 && threadIdx.x < 32) elect_one() ? void() : __syncwarp();  // one lane stays away
  if (which == 6 && threadIdx.x == 0) bar_sync(1, 64);
  if (which == 6 && threadIdx.x == 1) bar_sync(1, 96);
}

int guarded(char* message, int size, const std::function<void()>& run) {
  try {
    run();
    return 0;
  } catch (const std::exception& error) {
    snprintf(message, size, "%s", error.what());
    return 1;
  }
}

}  // namespace

extern "C" int emulate_product(const void* a, const void* b, float* d, int columns, int a_mn, int b_mn,
                               int registers, unsigned seed, char* message, int size) {
  const CUtensorMap map_a = matrix(a, 64, 64, 64),
                    map_b = b_mn ? matrix(b, 64, columns, 64) : matrix(b, columns, 64, columns);
  return guarded(message, size, [&] {
    emulator::launch(1, 1, 128, seed, [&] {
      const bool from_registers = registers != 0;
      if (columns == 64 && !a_mn && !b_mn) return product<64, 0, 0>(map_a, map_b, d, from_registers);
      if (columns == 64 && !a_mn && b_mn) return product<64, 0, 1>(map_a, map_b, d, from_registers);
      if (columns == 64 && a_mn && !b_mn) return product<64, 1, 0>(map_a, map_b, d, from_registers);
      if (columns == 256 && a_mn && b_mn) return product<256, 1, 1>(map_a, map_b, d, from_registers);
      if (columns == 128 && !a_mn && !b_mn) return product<128, 0, 0>(map_a, map_b, d, from_registers);
      if (columns == 128 && !a_mn && b_mn) return product<128, 0, 1>(map_a, map_b, d, from_registers);
      if (columns == 160 && !a_mn && !b_mn) return product<160, 0, 0>(map_a, map_b, d, from_registers);
      emulator::fail("no such form");
    });
  });
}

extern "C" int emulate_copy(const void* from, void* to, int rows, int cols, int row, int col, unsigned seed,
                            char* message, int size) {
  const CUtensorMap map_from = matrix(from, rows, cols, 64), map_to = matrix(to, rows, cols, 64);
  return guarded(message, size,
                 [&] { emulator::launch(1, 1, 128, seed, [&] { copy(map_from, map_to, row, col); }); });
}

extern "C" int emulate_broken(int which, unsigned seed, char* message, int size) {
  return guarded(message, size, [&] { emulator::launch(1, 1, 128, seed, [&] { broken(which); }); });
}
