// wgmma with bf16 operands and fp32 accumulators.
#pragma once
#include "cuda/common/ptx.cuh"

namespace nova {

// Operand lists: D10(3) = "%30, ..., %39".
#define NOVA_O10(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define NOVA_O0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9"
#define NOVA_F2(d, i) "+f"(d[i]), "+f"(d[(i) + 1])
#define NOVA_F8(d, i) NOVA_F2(d, i), NOVA_F2(d, (i) + 2), NOVA_F2(d, (i) + 4), NOVA_F2(d, (i) + 6)
#define NOVA_F16(d, i) NOVA_F8(d, i), NOVA_F8(d, (i) + 8)
#define NOVA_F32(d, i) NOVA_F16(d, i), NOVA_F16(d, (i) + 16)
#define NOVA_A32(d) NOVA_F32(d, 0)
#define NOVA_A64(d) NOVA_F32(d, 0), NOVA_F32(d, 32)
#define NOVA_A80(d) NOVA_F32(d, 0), NOVA_F32(d, 32), NOVA_F16(d, 64)
#define NOVA_A128(d) NOVA_F32(d, 0), NOVA_F32(d, 32), NOVA_F32(d, 64), NOVA_F32(d, 96)
#define NOVA_L32 NOVA_O0 ", " NOVA_O10(1) ", " NOVA_O10(2) ", %30, %31"
#define NOVA_L64                                                                             \
  NOVA_O0 ", " NOVA_O10(1) ", " NOVA_O10(2) ", " NOVA_O10(3) ", " NOVA_O10(4) ", " NOVA_O10( \
      5) ", %60, %61, %62, %63"
#define NOVA_L80                                                                             \
  NOVA_O0 ", " NOVA_O10(1) ", " NOVA_O10(2) ", " NOVA_O10(3) ", " NOVA_O10(4) ", " NOVA_O10( \
      5) ", " NOVA_O10(6) ", " NOVA_O10(7)
#define NOVA_L128                                                             \
  NOVA_L80 ", " NOVA_O10(8) ", " NOVA_O10(9) ", " NOVA_O10(10) ", " NOVA_O10( \
      11) ", %120, %121, %122, %123, %124, %125, %126, %127"

// D (64 x N, fp32, in registers) = A (64 x 16) * B (16 x N) + (accumulate ? D : 0). A_MN / B_MN = 1: that
// operand is MN-major in smem. accumulate is a runtime predicate, so a k loop needs no zeroing and no second
// code path.
template <int N, int A_MN, int B_MN>
struct Wgmma;
#define NOVA_WGMMA(N_, LIST, CONS, i0, i1, i2, i3, i4, i5, i6)                                               \
  template <int A_MN, int B_MN>                                                                              \
  struct Wgmma<N_, A_MN, B_MN> {                                                                             \
    static NOVA_DEV void ss(float (&d)[N_ / 2], uint64_t a, uint64_t b, int accumulate) {                    \
      asm volatile("{ .reg .pred p;\n setp.ne.b32 p, %" #i2                                                  \
                   ", 0;\n"                                                                                  \
                   " wgmma.mma_async.sync.aligned.m64n" #N_ "k16.f32.bf16.bf16 {" LIST "}, %" #i0 ", %" #i1  \
                   ", p, 1, 1, %" #i3 ", %" #i4 "; }"                                                        \
                   : CONS                                                                                    \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(A_MN), "n"(B_MN));                                 \
    }                                                                                                        \
    static NOVA_DEV void rs(float (&d)[N_ / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {        \
      static_assert(A_MN == 0, "register A is always K-major");                                              \
      asm volatile("{ .reg .pred p;\n setp.ne.b32 p, %" #i5                                                  \
                   ", 0;\n"                                                                                  \
                   " wgmma.mma_async.sync.aligned.m64n" #N_ "k16.f32.bf16.bf16 {" LIST "}, {%" #i0 ", %" #i1 \
                   ", %" #i2 ", %" #i3 "}, %" #i4 ", p, 1, 1, %" #i6 "; }"                                   \
                   : CONS                                                                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(B_MN));        \
    }                                                                                                        \
  };
NOVA_WGMMA(64, NOVA_L32, NOVA_A32(d), 32, 33, 34, 35, 36, 37, 38)
NOVA_WGMMA(128, NOVA_L64, NOVA_A64(d), 64, 65, 66, 67, 68, 69, 70)
NOVA_WGMMA(160, NOVA_L80, NOVA_A80(d), 80, 81, 82, 83, 84, 85,
           86)  // 320 columns = two of these (N = 320 itself is illegal)
NOVA_WGMMA(256, NOVA_L128, NOVA_A128(d), 128, 129, 130, 131, 132, 133, 134)
}  // namespace nova
