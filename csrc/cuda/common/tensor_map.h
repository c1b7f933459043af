// Host side: tensor maps, which describe a tensor and a box of it to the tensor memory accelerator.
// cuTensorMapEncodeTiled comes through the runtime, so libcuda is never linked and the library also loads on
// a machine without a driver.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>

#include "cuda/common/launch.h"

namespace nova {

struct MapDim {
  int64_t size;
  int64_t stride_bytes;  // of the innermost dimension: the element's size
  int box;
};

// Dimensions innermost first. With the 128-byte swizzle the innermost box must be 128 bytes.
// What the driver refuses: a base not at 16 bytes, strides that are no multiple of 16 or reach 2^40, box
// sides above 256.
inline CUtensorMap make_map(CUtensorMapDataType type, const void* base, std::initializer_list<MapDim> dims,
                            CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    // By version, the one that introduced the symbol: the unversioned call is deprecated in CUDA 13.
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000,
                                                               cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(pointer)
                                                                        : nullptr;
  }();
  if (encode == nullptr)
    throw std::runtime_error("no CUDA driver that makes tensor maps (version 12 or newer)");
  cuuint64_t size[5], stride[5];
  cuuint32_t box[5], step[5];
  cuuint32_t rank = 0;
  for (const MapDim& dim : dims) {
    size[rank] = static_cast<cuuint64_t>(dim.size);
    if (rank > 0) stride[rank - 1] = static_cast<cuuint64_t>(dim.stride_bytes);
    box[rank] = static_cast<cuuint32_t>(dim.box);
    step[rank++] = 1;
  }
  CUtensorMap map;
  const auto describe = [&] {
    return encode(&map, type, rank, const_cast<void*>(base), size, stride, box, step,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = describe();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {  // a thread's first use of the GPU, autograd's for instance
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");  // makes its context current, in CUDA 12 and newer
    result = describe();
  }
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("the driver refused a tensor map (CUresult " + std::to_string(result) + ")");
  }
  return map;
}

// rows x cols of bf16, contiguous; boxes of 64 columns, the width of the 128-byte swizzle.
inline CUtensorMap map_matrix_bf16(const void* base, int64_t rows, int64_t cols, int box_rows) {
  return make_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, base, {{cols, 2, 64}, {rows, 2 * cols, box_rows}});
}

}  // namespace nova
