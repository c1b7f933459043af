// forms.cuh on a GPU, for test_emulator.py: nvcc -shared, called through ctypes with device pointers.
#include "forms.cuh"

#include <cstdio>
#include <functional>

#include "cuda/common/tensor_map.h"

using namespace nova;

namespace {

constexpr int kBytes = sizeof(Tiles) + 1024;

template <class Kernel, class... Arguments>
void run(Kernel* kernel, Arguments... arguments) {
  allow_shared_memory(kernel, kBytes);
  kernel<<<1, 128, kBytes>>>(arguments...);
  check(cudaGetLastError(), "launch");
  check(cudaDeviceSynchronize(), "kernel");
}

int guarded(char* message, int size, const std::function<void()>& call) {
  try {
    call();
    return 0;
  } catch (const std::exception& error) {
    snprintf(message, size, "%s", error.what());
    return 1;
  }
}

}  // namespace

extern "C" int emulate_product(const void* a, const void* b, float* d, int columns, int a_mn, int b_mn,
                               int registers, unsigned, char* message, int size) {
  return guarded(message, size, [&] {
    const CUtensorMap map_a = map_matrix_bf16(a, 64, 64, 64);
    const CUtensorMap map_b =
        b_mn ? map_matrix_bf16(b, 64, columns, 64) : map_matrix_bf16(b, columns, 64, columns);
    const bool from_registers = registers != 0;
    if (columns == 64 && !a_mn && !b_mn) return run(product<64, 0, 0>, map_a, map_b, d, from_registers);
    if (columns == 64 && !a_mn && b_mn) return run(product<64, 0, 1>, map_a, map_b, d, from_registers);
    if (columns == 64 && a_mn && !b_mn) return run(product<64, 1, 0>, map_a, map_b, d, from_registers);
    if (columns == 256 && a_mn && b_mn) return run(product<256, 1, 1>, map_a, map_b, d, from_registers);
    if (columns == 128 && !a_mn && !b_mn) return run(product<128, 0, 0>, map_a, map_b, d, from_registers);
    if (columns == 128 && !a_mn && b_mn) return run(product<128, 0, 1>, map_a, map_b, d, from_registers);
    if (columns == 160 && !a_mn && !b_mn) return run(product<160, 0, 0>, map_a, map_b, d, from_registers);
    require(false, "no such form");
  });
}

extern "C" int emulate_copy(const void* from, void* to, int rows, int cols, int row, int col, unsigned,
                            char* message, int size) {
  return guarded(message, size, [&] {
    run(copy, map_matrix_bf16(from, rows, cols, 64), map_matrix_bf16(to, rows, cols, 64), row, col);
  });
}
