// What every sm_90a kernel includes: the instructions, and what is built from them. With NOVA_EMULATOR the
// instructions are those of an emulator, so that a kernel's protocol and arithmetic run on a CPU
// (tests/kernels/emulator).
#pragma once
#include <cstdint>

#ifdef NOVA_EMULATOR
#include NOVA_EMULATOR
#else
#include "cuda/common/ptx.cuh"
#include "cuda/common/wgmma.cuh"
#endif
#include "cuda/common/tile_math.h"

namespace nova {

// Ring position: stage index and phase parity move together; the parity flips when the stage wraps. Never
// derive it from a modulo.
template <int STAGES>
struct Ring {
  uint32_t stage = 0, phase = 0;
  NOVA_DEV void next() {
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Shared-memory operand descriptor, 128-byte swizzle. See the guide for what LBO and SBO mean per major-ness.
//   K-major  (rows of 64 k):     lbo ignored (1), sbo = 1024 (next 8 rows).              k+16: +32 bytes  ->
//   lo += 2 MN-major (rows of 64 m/n):   lbo = bytes to the next 64 m/n, sbo = 1024 (next 8 k).  k+16: +2048
//   bytes -> lo += 128
NOVA_DEV uint64_t smem_desc_128B(uint32_t addr, uint32_t lbo_bytes, uint32_t sbo_bytes) {
  uint64_t d = 0;
  d |= static_cast<uint64_t>((addr & 0x3FFFF) >> 4);             // bits  0-13 start address / 16
  d |= static_cast<uint64_t>((lbo_bytes & 0x3FFFF) >> 4) << 16;  // bits 16-29 leading byte offset / 16
  d |= static_cast<uint64_t>((sbo_bytes & 0x3FFFF) >> 4) << 32;  // bits 32-45 stride byte offset / 16
  /* bits 49-51 base offset = 0: every 8-row x 128-byte atom starts on a 1024-byte boundary */
  d |= 1ull << 62;  // bits 62-63: 0 none, 1 = 128B, 2 = 64B, 3 = 32B
  return d;
}
NOVA_DEV uint64_t desc_k_major(const void* tile) { return smem_desc_128B(smem_addr(tile), 16, 1024); }
NOVA_DEV uint64_t desc_mn_major(const void* tile, uint32_t chunk_bytes) {
  return smem_desc_128B(smem_addr(tile), chunk_bytes, 1024);
}
constexpr uint64_t kAdvK16_KMajor = 32 >> 4;  // add to the descriptor per k16 step inside one 64-wide tile
constexpr uint64_t kAdvK16_MNMajor = (16 * 128) >> 4;

}  // namespace nova
