// Host side of -DNOVA_HANG_FLAG: says which barrier a kernel gave up to wait for. Without it, nothing.
#pragma once
#include <string>

#include "cuda/common/hopper.cuh"
#include "cuda/common/launch.h"

namespace nova {

// After a launch. Static, because every file's kernels have a flag of their own.
static void check_hang_flag([[maybe_unused]] const char* what) {
#ifdef NOVA_HANG_FLAG
  unsigned flag = 0;
  const unsigned none = 0;
  check(cudaDeviceSynchronize(), what);
  check(cudaMemcpyFromSymbol(&flag, nova_hang_flag, sizeof flag), what);
  check(cudaMemcpyToSymbol(nova_hang_flag, &none, sizeof none), what);
  if (flag != 0)
    throw std::runtime_error(std::string(what) + ": gave up to wait for the barrier at shared address " +
                             std::to_string(flag & 0x7ffffffe) + ", parity " + std::to_string(flag & 1));
#endif
}

}  // namespace nova
