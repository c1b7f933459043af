// Index logic shared by kernels and host tests: plain C++ when nvcc is not the compiler, so it can be tested
// exhaustively on a CPU.
#pragma once
#include <cstdint>
#ifdef __CUDACC__
#define NOVA_HD __host__ __device__ __forceinline__
#else
#define NOVA_HD inline
#endif

namespace nova {

NOVA_HD int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Tile number -> (m, n). Tiles go down `group` m-tiles before they step to the next n-tile, so that the ~132
// tiles in flight share few A and B panels in L2. The last group may be shorter.
struct TileOrder {
  int tiles_m, tiles_n, group;
  NOVA_HD int count() const { return tiles_m * tiles_n; }
  NOVA_HD void at(int tile, int& m, int& n) const {
    const int per_group = group * tiles_n;
    const int first_m = (tile / per_group) * group;
    const int height = tiles_m - first_m < group ? tiles_m - first_m : group;
    const int in_group = tile % per_group;
    m = first_m + in_group % height;
    n = in_group / height;
  }
};

// Byte offset of 16-byte unit `u` (0..7) of row `r` inside a 128-byte-swizzled tile whose base is 1024-byte
// aligned.
NOVA_HD uint32_t swizzle_128B(uint32_t r, uint32_t u) { return r * 128 + ((u ^ (r & 7)) << 4); }

}  // namespace nova
