// Barriers in shared memory, tensor copies, and products of the tensor cores: what they do, and when.
#pragma once
#include "cuda.h"

struct CUtensorMap {  // not the driver's layout: ours
  const uint8_t* base;
  int rank, element_bytes, swizzle_bytes;
  int64_t size[5], stride[5];  // innermost first; strides in bytes
  int box[5];
};

namespace nova::emulator {

inline uint8_t* at(uint32_t address) {
  const uint32_t rank = address / kWindow;
  if (rank >= machine.ctas.size()) fail("shared address %08x is in no CTA of the cluster", address);
  return machine.ctas[rank].memory.get() + address % kWindow;
}
inline Barrier& barrier_at(uint32_t address) {
  auto& barriers = machine.ctas[address / kWindow].barriers;
  const auto found = barriers.find(address % kWindow);
  if (found == barriers.end()) fail("the mbarrier at offset %u was never initialised", address % kWindow);
  return found->second;
}
inline void arrive(uint32_t address, int64_t bytes) {
  Barrier& barrier = barrier_at(address);
  if (barrier.pending <= 0) fail("one arrival too many on the mbarrier at offset %u", address % kWindow);
  barrier.bytes += bytes;
  --barrier.pending;
  barrier.settle();
}
inline void bytes_landed(uint32_t address, int64_t bytes) {
  Barrier& barrier = barrier_at(address);
  barrier.bytes -= bytes;
  barrier.settle();
}

inline uint32_t swizzled(uint32_t offset, int swizzle_bytes) {  // offset from a 1024-byte boundary
  return swizzle_bytes == 128 ? offset ^ (offset >> 3 & 0x70) : offset;
}
// Calls move(element in shared memory, element in global memory or null where the box leaves the tensor).
template <class Move>
void for_box(const CUtensorMap& map, std::array<int, 5> corner, const Move& move) {
  std::array<int, 5> i{};
  for (uint32_t element = 0;; ++element) {
    int64_t offset = 0;
    bool inside = true;
    for (int d = 0; d < map.rank; ++d) {
      const int64_t c = static_cast<int64_t>(corner[d]) + i[d];
      inside = inside && c >= 0 && c < map.size[d];
      offset += c * (d == 0 ? map.element_bytes : map.stride[d]);
    }
    move(swizzled(element * map.element_bytes, map.swizzle_bytes),
         inside ? const_cast<uint8_t*>(map.base) + offset : nullptr);
    int d = 0;
    while (d < map.rank && ++i[d] == map.box[d]) i[d++] = 0;
    if (d == map.rank) return;
  }
}
inline int box_bytes(const CUtensorMap& map) {
  int bytes = map.element_bytes;
  for (int d = 0; d < map.rank; ++d) bytes *= map.box[d];
  return bytes;
}
inline void aligned_copy(uint32_t address, const CUtensorMap& map) {
  const uint32_t needed = map.swizzle_bytes == 128 ? 1024 : 128;
  if (address % needed)
    fail("a tensor copy at shared offset %u, not a multiple of %u", address % kWindow, needed);
}
inline void load_box(uint32_t address, const CUtensorMap* map, uint32_t barrier, std::array<int, 5> corner,
                     int rank, uint32_t cta_mask) {
  if (map->rank != rank) fail("a %dD load with a map of rank %d", rank, map->rank);
  aligned_copy(address, *map);
  for (uint32_t cta = 0; cta < 16; ++cta) {
    if (!(cta_mask >> cta & 1)) continue;
    const uint32_t to = address % kWindow + cta * kWindow, signal = barrier % kWindow + cta * kWindow;
    machine.pending.push_back({[to, signal, map, corner] {
      if (machine.ctas[to / kWindow].running == 0) fail("a copy lands in a CTA that has ended");
      for_box(*map, corner, [&](uint32_t offset, const uint8_t* from) {
        if (from != nullptr) std::memcpy(at(to) + offset, from, map->element_bytes);
        if (from == nullptr) std::memset(at(to) + offset, 0, map->element_bytes);
      });
      bytes_landed(signal, box_bytes(*map));
    }});
  }
}
inline void store_box(const CUtensorMap* map, uint32_t address, std::array<int, 5> corner, int rank,
                      bool add) {
  if (map->rank != rank) fail("a %dD store with a map of rank %d", rank, map->rank);
  aligned_copy(address, *map);
  Thread& thread = self();
  if (!thread.open_group) thread.open_group = std::make_shared<int>(0);
  auto group = thread.open_group;
  ++*group;
  machine.pending.push_back({[=] {
    for_box(*map, corner, [&](uint32_t offset, uint8_t* to) {
      if (to == nullptr) return;
      if (!add) {
        std::memcpy(to, at(address) + offset, map->element_bytes);
      } else if (map->element_bytes == 4) {
        *reinterpret_cast<float*>(to) += *reinterpret_cast<const float*>(at(address) + offset);
      } else {
        fail("adding copies are emulated for fp32 only");
      }
    });
    --*group;
  }});
}

// Element (row, k) of an operand tile with the 128-byte swizzle; mn_major: rows of the tile are k.
inline float operand(const Cta& cta, uint64_t descriptor, int mn_major, int row, int k) {
  if (descriptor >> 62 != 1) fail("only the 128-byte swizzle is emulated");
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  uint32_t address;
  if (mn_major) {  // 64 consecutive m or n per line of 128 bytes, one line per k
    address = start + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2;
  } else {  // 64 consecutive k per line of 128 bytes, one line per row; k16 steps move `start` inside the
            // line
    address = start + row / 8 * stride + row % 8 * 128 + k * 2;
  }
  address ^= address >> 3 & 0x70;  // of the final address
  return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(cta.memory.get() + address % kWindow));
}
inline void multiply(const Cta& cta, Product& product) {
  const int N = product.columns;
  float a[64][16];
  std::vector<std::array<float, 16>> b(N);
  for (int m = 0; m < 64; ++m) {
    for (int k = 0; k < 16; ++k) {
      if (!product.a_in_registers) {
        a[m][k] = operand(cta, product.a, product.a_mn, m, k);
        continue;
      }
      // Thread 4 (m % 8) + (k % 8) / 2 of warp m / 16 holds it: first rows 0-7 then 8-15 of k 0-7, then of k
      // 8-15.
      const int thread = m / 16 * 32 + m % 8 * 4 + k % 8 / 2, word = m % 16 / 8 + k / 8 * 2;
      const uint32_t pair = product.a_registers[thread][word];
      a[m][k] = __uint_as_float(k % 2 ? pair & 0xffff0000u : pair << 16);
    }
  }
  for (int n = 0; n < N; ++n)
    for (int k = 0; k < 16; ++k) b[n][k] = operand(cta, product.b, product.b_mn, n, k);
  for (int thread = 0; thread < 128; ++thread) {
    float* d = product.d[thread];
    for (int i = 0; i < N / 2; ++i) {
      const int m = thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2);
      const int n = 8 * (i / 4) + 2 * (thread % 4) + i % 2;
      float sum = 0.f;
      for (int k = 0; k < 16; ++k) sum += a[m][k] * b[n][k];
      d[i] = product.accumulate ? d[i] + sum : sum;
    }
  }
  product.done = true;
}
inline void execute_through(Cta& cta, Warpgroup& group, size_t count) {
  while (group.executed < count && group.products[group.executed].issued == 128) {
    Product& product = group.products[group.executed++];
    multiply(cta, product);
    product.d.clear();
  }
}
inline void issue(float* d, int columns, const uint32_t* a_registers, uint64_t a, uint64_t b, int a_mn,
                  int b_mn, int accumulate) {
  Thread& thread = self();
  Warpgroup& group = thread.cta->warpgroups[thread.number / 128];
  const size_t index = thread.products++;
  if (group.products.size() <= index) group.products.resize(index + 1);
  Product& product = group.products[index];
  if (product.issued == 0) {
    product.columns = columns;
    product.a_in_registers = a_registers != nullptr;
    product.a = a, product.b = b, product.a_mn = a_mn, product.b_mn = b_mn, product.accumulate = accumulate;
    product.d.assign(128, nullptr);
    if (a_registers) product.a_registers.resize(128);
  }
  if (product.columns != columns || product.a != a || product.b != b || product.accumulate != accumulate)
    fail("the threads of a warpgroup disagree about a wgmma");
  product.d[thread.number % 128] = d;
  if (a_registers) std::copy_n(a_registers, 4, product.a_registers[thread.number % 128].begin());
  if (++product.issued == 128 && machine.chance()) execute_through(*thread.cta, group, index + 1);
}

}  // namespace nova::emulator
