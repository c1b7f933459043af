// What every launcher does before and after its kernel. Errors are C++ exceptions, which pybind11 turns into
// ValueError (std::invalid_argument) and RuntimeError; arguments are checked before the driver is touched.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace nova {

inline void require(bool holds, const std::string& rule) {
  if (!holds) throw std::invalid_argument(rule);
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline void require_aligned(uintptr_t pointer, int bytes, const char* name) {
  require(pointer != 0 && pointer % bytes == 0,
          std::string(name) + " is not a pointer to a multiple of " + std::to_string(bytes) + " bytes");
}

// Of the current device; kernels size their grids by it, and no result may depend on it.
inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

// Above 48 KB a kernel has to be told how much dynamic shared memory it may have.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "cudaFuncSetAttribute");
}

}  // namespace nova
