// What CUDA C++ has and C++ has not: keywords, vector types, bf16, built-in variables, and the collectives of
// a warp and a block.
#pragma once
#include <cmath>

#include "fibers.h"

#define NOVA_DEV inline
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __restrict__
#define threadIdx (::nova::emulator::self().index)
#define blockIdx (::nova::emulator::self().cta->index)
#define gridDim (::nova::emulator::machine.grid)
#define blockDim (::nova::emulator::machine.block)
#define NOVA_SHARED_MEMORY(Layout, name)                                                                   \
  Layout& name = *reinterpret_cast<Layout*>(                                                               \
      (reinterpret_cast<uintptr_t>(::nova::emulator::self().cta->memory.get() + ::nova::emulator::kBase) + \
       1023) &                                                                                             \
      ~uintptr_t(1023))

using std::isinf;
using std::isnan;
using std::max;
using std::min;

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct int2 {
  int x, y;
};
struct int4 {
  int x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {  // to nearest, ties to even
  uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

namespace nova::emulator {

// Every lane of the warp deposits a value and gets all 32.
inline std::array<uint64_t, 32> exchange(uint64_t value) {
  Thread& thread = self();
  const int64_t number = thread.collectives++;
  WarpExchange& slot = thread.cta->exchanges[2 * (thread.number / 32) + number % 2];
  if (slot.number != number) {
    slot.number = number;
    slot.arrived = 0;
  }
  slot.value[thread.number % 32] = value;
  ++slot.arrived;
  wait_until("the other lanes of the warp", [&slot] { return slot.arrived == 32; });
  std::array<uint64_t, 32> all;
  std::copy_n(slot.value, 32, all.begin());
  return all;
}
template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline void full_mask(uint32_t mask) {
  if (mask != 0xffffffff) fail("a warp collective with mask %08x: only whole warps are emulated", mask);
}
inline void synchronize(const char* what, NamedBarrier& barrier, int threads, bool wait) {
  if (barrier.threads != 0 && barrier.threads != threads)
    fail("a named barrier of %d threads is used with %d", barrier.threads, threads);
  barrier.threads = threads;
  const int generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier = {0, generation + 1, 0};
    return;
  }
  if (wait) wait_until(what, [&barrier, generation] { return barrier.generation != generation; });
}

}  // namespace nova::emulator

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  ::nova::emulator::full_mask(mask);
  const int lane = ::nova::emulator::self().number % 32;
  return ::nova::emulator::from_bits<T>(
      ::nova::emulator::exchange(::nova::emulator::to_bits(value))[lane ^ lanes]);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int source) {
  ::nova::emulator::full_mask(mask);
  return ::nova::emulator::from_bits<T>(
      ::nova::emulator::exchange(::nova::emulator::to_bits(value))[source % 32]);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int lanes) {
  ::nova::emulator::full_mask(mask);
  const int lane = ::nova::emulator::self().number % 32, from = lane + lanes < 32 ? lane + lanes : lane;
  return ::nova::emulator::from_bits<T>(::nova::emulator::exchange(::nova::emulator::to_bits(value))[from]);
}
inline bool __any_sync(uint32_t mask, bool value) {
  ::nova::emulator::full_mask(mask);
  for (uint64_t lane : ::nova::emulator::exchange(value))
    if (lane) return true;
  return false;
}
inline void __syncwarp() { ::nova::emulator::exchange(0); }
inline void __syncthreads() {
  ::nova::emulator::Cta& cta = *::nova::emulator::self().cta;
  ::nova::emulator::synchronize("__syncthreads", cta.named[0],
                                static_cast<int>(::nova::emulator::machine.block.x), true);
}
