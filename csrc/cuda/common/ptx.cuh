// The Hopper (sm_90a) instructions our kernels use, one wrapper each, with its pitfalls beside it. No
// CUTLASS, no libtorch.
#pragma once
#include <cuda.h>  // types and enums of the driver API; nothing of libcuda is linked
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace nova {

#define NOVA_DEV __device__ __forceinline__
// Dynamic shared memory is promised 16-byte alignment only; a tile with the 128-byte swizzle needs 1024.
// Found by an offset: through an integer the compiler loses sight of the address space, and loads become
// generic.
#define NOVA_SHARED_MEMORY(Layout, name)         \
  extern __shared__ uint8_t nova_dynamic_smem[]; \
  Layout& name = *reinterpret_cast<Layout*>(     \
      nova_dynamic_smem + (-static_cast<uint32_t>(__cvta_generic_to_shared(nova_dynamic_smem)) & 1023))

#ifdef NOVA_HANG_FLAG
__device__ unsigned nova_hang_flag;  // of this file's kernels; check_hang_flag() in hang_flag.h reads it
#endif

// ------------------------------------------------------------------ addresses
NOVA_DEV uint32_t smem_addr(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
// The same offset inside the shared memory of CTA `rank` of the cluster.
NOVA_DEV uint32_t map_to_cta(uint32_t addr, uint32_t rank) {
  uint32_t r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(addr), "r"(rank));
  return r;
}
NOVA_DEV uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
// Release/acquire over all threads of the cluster. Needed after mbarrier init and before exit when peers
// still write to us.
NOVA_DEV void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
// One lane of a converged warp; uniform, so the compiler keeps the branch cheap (`threadIdx.x == 0` would
// diverge).
NOVA_DEV bool elect_one() {
  uint32_t p;
  asm volatile("{ .reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.u32 %0, 1, 0, p; }" : "=r"(p));
  return p != 0;
}

// Warpgroup number, broadcast so that the compiler knows it is the same for the whole warp: descriptors and
// barrier addresses derived from it then live in uniform registers instead of costing two vector registers
// each.
NOVA_DEV int warpgroup_index() { return __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 128, 0); }
// Hides where a value came from, so that `value + constant` is recomputed in the loop instead of being kept
// in a register per constant.
NOVA_DEV uint64_t opaque(uint64_t v) {
  asm volatile("" : "+l"(v));
  return v;
}

// ------------------------------------------------------------------ mbarrier (8 bytes, 8-byte aligned)
// `count` = arrivals that finish a phase. A TMA "full" barrier: 1 (the producer's arrive_expect_tx). An
// "empty" barrier: one per consumer warpgroup (or warp) that will arrive, over ALL CTAs of the cluster that
// read this buffer when loads are multicast.
NOVA_DEV void mbar_init(uint64_t* bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_addr(bar)), "r"(count) : "memory");
}
// After the inits, before any use: makes them visible to the async proxy and to the cluster.
NOVA_DEV void mbar_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrive AND raise the pending byte count. Order: expect first, then issue the copies (same thread), else a
// phase may end early. bytes counts what lands in THIS CTA: with multicast every receiving CTA expects the
// full bytes of all slices it gets.
NOVA_DEV void mbar_arrive_expect_tx(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_addr(bar)), "r"(bytes)
               : "memory");
}
NOVA_DEV void mbar_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_addr(bar)) : "memory");
}
// Arrive on the barrier of another CTA. Releases to this CTA only, which is enough where the stage was read
// by wgmma and that was waited for: `.release.cluster` becomes a MEMBAR.ALL.GPU, one per step of a main loop.
NOVA_DEV void mbar_arrive_cluster(uint64_t* bar, uint32_t cta) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(map_to_cta(smem_addr(bar), cta))
               : "memory");
}
// Returns once the phase with this parity has completed. A fresh barrier is in phase 0: wait(0) blocks until
// the first phase is done, wait(1) passes at once (so producers start with parity 1 on "empty", consumers
// with parity 0 on "full"). The wait can only tell a phase from its neighbour: never fall two phases behind.
// try_wait may return false spuriously: loop.
NOVA_DEV bool mbar_try_wait(uint64_t* bar, uint32_t parity) {
  uint32_t ok;
  asm volatile(
      "{ .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p; }"
      : "=r"(ok)
      : "r"(smem_addr(bar)), "r"(parity)
      : "memory");
  return ok != 0;
}
NOVA_DEV void mbar_wait(uint64_t* bar, uint32_t parity) {
#ifdef NOVA_HANG_FLAG  // debug build: a lost arrival becomes a set flag (smem offset of the barrier) and
                       // wrong numbers, not a hung GPU. Once it is set, other waits give up soon.
  for (uint32_t n = 0; !mbar_try_wait(bar, parity);
       ++n)  // No __trap() here: ptxas then drops the setmaxnreg budget, spills, serialises wgmma
    if (n > (1u << 20) || (n > 64 && *static_cast<volatile unsigned*>(&nova_hang_flag) != 0)) {
      nova_hang_flag = smem_addr(bar) | 1u << 31 | parity;
      break;
    }
#else
  while (!mbar_try_wait(bar, parity)) {
  }
#endif
}
// ------------------------------------------------------------------ TMA (coordinates: innermost dimension
// first, in ELEMENTS)
NOVA_DEV void tma_prefetch_desc(const CUtensorMap* m) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(m)) : "memory");
}
// One thread issues. dst 128-byte aligned (1024 for the 128B swizzle). Out-of-range elements arrive as zeros
// and DO count as bytes.
NOVA_DEV void tma_load_2d(void* dst, const CUtensorMap* m, uint64_t* bar, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(smem_addr(dst)),
      "l"(reinterpret_cast<uint64_t>(m)), "r"(smem_addr(bar)), "r"(c0), "r"(c1)
      : "memory");
}
NOVA_DEV void tma_load_3d(void* dst, const CUtensorMap* m, uint64_t* bar, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(smem_addr(dst)),
      "l"(reinterpret_cast<uint64_t>(m)), "r"(smem_addr(bar)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
// L2 policy: reused operands keep, streamed operands go first. Make it once per thread, pass the 64-bit value
// around.
NOVA_DEV uint64_t l2_evict_first() {
  uint64_t p;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p));
  return p;
}
NOVA_DEV uint64_t l2_evict_last() {
  uint64_t p;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(p));
  return p;
}
NOVA_DEV void tma_load_2d_hint(void* dst, const CUtensorMap* m, uint64_t* bar, int c0, int c1,
                               uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, "
      "{%3, %4}], [%2], %5;" ::"r"(smem_addr(dst)),
      "l"(reinterpret_cast<uint64_t>(m)), "r"(smem_addr(bar)), "r"(c0), "r"(c1), "l"(policy)
      : "memory");
}
// Multicast: the tile lands at the SAME smem offset in every CTA of `mask`, and signals the barrier at the
// same offset in each of them. So before refilling, the issuer must know that the buffer is empty in ALL of
// those CTAs.
NOVA_DEV void tma_load_2d_multicast(void* dst, const CUtensorMap* m, uint64_t* bar, int c0, int c1,
                                    uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(smem_addr(dst)),
      "l"(reinterpret_cast<uint64_t>(m)), "r"(smem_addr(bar)), "r"(c0), "r"(c1), "h"(mask)
      : "memory");
}
// Store smem -> global: clips at the tensor's edge by itself. Before: fence_proxy_async() by every writing
// thread, THEN a barrier, then one thread issues. The buffer may be rewritten only after
// tma_store_wait_read<..>() by that same thread + a barrier.
NOVA_DEV void tma_store_2d(const CUtensorMap* m, const void* src, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
                   reinterpret_cast<uint64_t>(m)),
               "r"(smem_addr(src)), "r"(c0), "r"(c1)
               : "memory");
}
// fp32 (or bf16) add at L2. Order between CTAs is not fixed: results are reproducible only when each address
// gets one add per launch.
NOVA_DEV void tma_reduce_add_2d(const CUtensorMap* m, const void* src, int c0, int c1) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
          reinterpret_cast<uint64_t>(m)),
      "r"(smem_addr(src)), "r"(c0), "r"(c1)
      : "memory");
}
NOVA_DEV void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N>
NOVA_DEV void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
template <int N>
NOVA_DEV void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
// Plain bulk copy of a contiguous run (16-byte aligned address and size); no tensor map. Good for row gathers
// (one row = one copy).
NOVA_DEV void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          smem_addr(dst)),
      "l"(src), "r"(bytes), "r"(smem_addr(bar))
      : "memory");
}
// 16-byte cp.async (Ampere style); src_bytes 0 fills zeros. cp_async_arrive makes the thread's earlier
// cp.asyncs arrive on an mbarrier (noinc: the arrival is one of the barrier's `count`). Data written this way
// comes through the generic proxy: wgmma needs the fence.
NOVA_DEV void cp_async_16(void* dst, const void* src, uint32_t src_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_addr(dst)), "l"(src), "r"(src_bytes)
               : "memory");
}
NOVA_DEV void cp_async_arrive(uint64_t* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_addr(bar)) : "memory");
}
// Ordinary smem writes (st.shared, stmatrix, cp.async) -> async proxy (TMA store, wgmma operand). By each
// WRITING thread.
NOVA_DEV void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ------------------------------------------------------------------ named barriers (0 is __syncthreads;
// use 1..15) threads = all that sync PLUS all that only arrive, a multiple of 32.
NOVA_DEV void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
NOVA_DEV void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ------------------------------------------------------------------ register budget per warpgroup (multiples
// of 8, 24..256)
template <int N>
NOVA_DEV void reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
NOVA_DEV void reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ------------------------------------------------------------------ stmatrix: four 8x8 b16 tiles; lane l
// gives the row address of tile l/8, row l%8
NOVA_DEV void stmatrix_x4(uint32_t addr, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}
NOVA_DEV void stmatrix_x4_trans(uint32_t addr, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}
// 16 bytes to global memory in one instruction: a uint4 assignment was seen to become four of 4 bytes.
NOVA_DEV void store_16(void* p, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
NOVA_DEV uint32_t pack_bf16(float lo, float hi) {  // one cvt.rn.bf16x2; lo = the lower column
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
NOVA_DEV float exp2_fast(float x) {  // one MUFU; exp2(-inf) = 0 exactly
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

NOVA_DEV float log2_fast(float x) {  // one MUFU; log2(0) = -inf
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ------------------------------------------------------------------ wgmma
NOVA_DEV void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}  // before the first wgmma that reads/writes registers
NOVA_DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
NOVA_DEV void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Stops the compiler from moving register reads/writes across the asynchronous region (costs no instruction).
template <int N>
NOVA_DEV void keep(float (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(r[i])::"memory");
}

// keep() does not bind ptxas: it was seen to hoist wgmma.wait_group 0 above a whole softmax, which loses the
// overlap with P * V. A predicated store that needs the softmax's result (a sum of exponentials, never
// negative: never executed) holds the wait where it was written.
NOVA_DEV void order_after(float never_negative, uint32_t any_smem) {
  asm volatile(
      "{ .reg .pred p;\n setp.lt.f32 p, %0, 0f00000000;\n @p st.shared.f32 [%1], %0; }" ::"f"(never_negative),
      "r"(any_smem)
      : "memory");
}

}  // namespace nova
