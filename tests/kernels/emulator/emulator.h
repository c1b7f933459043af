// The instructions of cuda/common/ptx.cuh and wgmma.cuh on a CPU: include path of NOVA_EMULATOR. Same names,
// same rules; a broken rule (an uninitialised barrier, too many arrivals, a misaligned copy, threads that
// disagree about a descriptor, a wait that never ends) is an error.
//
// Asynchronous work lands at a random moment between its issue and the wait for it: a missing wait or a
// buffer refilled too early then gives wrong numbers for some seed. Not modelled: the two proxies
// (fence_proxy_async), register budgets, time.
#pragma once
#include "asynchronous.h"

namespace nova {

inline uint32_t smem_addr(const void* p) {
  const emulator::Cta& cta = *emulator::self().cta;
  const ptrdiff_t offset = static_cast<const uint8_t*>(p) - cta.memory.get();
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(emulator::kWindow))
    emulator::fail("not a shared address");
  return cta.rank * emulator::kWindow + static_cast<uint32_t>(offset);
}
inline uint32_t map_to_cta(uint32_t address, uint32_t rank) {
  return address % emulator::kWindow + rank * emulator::kWindow;
}
inline uint32_t cluster_rank() { return emulator::self().cta->rank; }
inline void cluster_sync() {
  const int threads = static_cast<int>(emulator::machine.threads.size());
  emulator::synchronize("the cluster", emulator::machine.cluster_barrier, threads, true);
}
inline bool elect_one() { return emulator::self().number % 32 == 0; }
inline int warpgroup_index() { return emulator::self().number / 128; }
inline uint64_t opaque(uint64_t value) { return value; }

inline void mbar_init(uint64_t* bar, uint32_t count) {
  const uint32_t address = smem_addr(bar);
  if (address % 8) emulator::fail("an mbarrier at shared offset %u, not a multiple of 8", address);
  emulator::Barrier barrier;
  barrier.count = barrier.pending = static_cast<int>(count);
  if (!emulator::self().cta->barriers.emplace(address % emulator::kWindow, barrier).second)
    emulator::fail("an mbarrier is initialised twice");
}
inline void mbar_init_fence() {}
inline void mbar_arrive_expect_tx(uint64_t* bar, uint32_t bytes) { emulator::arrive(smem_addr(bar), bytes); }
inline void mbar_arrive(uint64_t* bar) { emulator::arrive(smem_addr(bar), 0); }
inline void mbar_arrive_cluster(uint64_t* bar, uint32_t cta) {
  if (emulator::machine.ctas[cta].running == 0) emulator::fail("an arrival in a CTA that has ended");
  emulator::arrive(map_to_cta(smem_addr(bar), cta), 0);
}
inline bool mbar_try_wait(uint64_t* bar, uint32_t parity) {
  return emulator::barrier_at(smem_addr(bar)).phase != static_cast<int>(parity);
}
inline void mbar_wait(uint64_t* bar, uint32_t parity) {
  emulator::Barrier& barrier = emulator::barrier_at(smem_addr(bar));
  emulator::wait_until("an mbarrier",
                       [&barrier, parity] { return barrier.phase != static_cast<int>(parity); });
}

inline void tma_prefetch_desc(const CUtensorMap*) {}
inline uint64_t l2_evict_first() { return 0; }
inline uint64_t l2_evict_last() { return 0; }
inline void tma_load_2d(void* to, const CUtensorMap* map, uint64_t* bar, int c0, int c1) {
  emulator::load_box(smem_addr(to), map, smem_addr(bar), {c0, c1}, 2, 1u << cluster_rank());
}
inline void tma_load_2d_hint(void* to, const CUtensorMap* map, uint64_t* bar, int c0, int c1, uint64_t) {
  tma_load_2d(to, map, bar, c0, c1);
}
inline void tma_load_3d(void* to, const CUtensorMap* map, uint64_t* bar, int c0, int c1, int c2) {
  emulator::load_box(smem_addr(to), map, smem_addr(bar), {c0, c1, c2}, 3, 1u << cluster_rank());
}
inline void tma_load_2d_multicast(void* to, const CUtensorMap* map, uint64_t* bar, int c0, int c1,
                                  uint16_t mask) {
  emulator::load_box(smem_addr(to), map, smem_addr(bar), {c0, c1}, 2, mask);
}
inline void tma_store_2d(const CUtensorMap* map, const void* from, int c0, int c1) {
  emulator::store_box(map, smem_addr(from), {c0, c1}, 2, false);
}
inline void tma_store_3d(const CUtensorMap* map, const void* from, int c0, int c1, int c2) {
  emulator::store_box(map, smem_addr(from), {c0, c1, c2}, 3, false);
}
inline void tma_reduce_add_2d(const CUtensorMap* map, const void* from, int c0, int c1) {
  emulator::store_box(map, smem_addr(from), {c0, c1}, 2, true);
}
inline void tma_store_commit() {
  emulator::Thread& thread = emulator::self();
  if (thread.open_group) thread.store_groups.push_back(std::move(thread.open_group));
  thread.open_group = nullptr;
}
template <int N>
void tma_store_wait() {
  emulator::Thread& thread = emulator::self();
  emulator::wait_until("its tensor stores", [&thread] {
    for (size_t i = 0; i + N < thread.store_groups.size(); ++i)  // all but the N newest groups
      if (*thread.store_groups[i] != 0) return false;
    return true;
  });
}
template <int N>
void tma_store_wait_read() {
  tma_store_wait<N>();
}
inline void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* bar) {
  const uint32_t address = smem_addr(to), signal = smem_addr(bar);
  if (address % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)
    emulator::fail("a misaligned bulk copy");
  emulator::machine.pending.push_back({[=] {
    std::memcpy(emulator::at(address), from, bytes);
    emulator::bytes_landed(signal, bytes);
  }});
}
inline void fence_proxy_async() {}
inline void bar_sync(int id, int threads) {
  emulator::synchronize("a named barrier", emulator::self().cta->named[id], threads, true);
}
inline void bar_arrive(int id, int threads) {
  emulator::synchronize("", emulator::self().cta->named[id], threads, false);
}
template <int N>
void reg_alloc() {}
template <int N>
void reg_dealloc() {}
inline void store_matrix_lines(uint32_t address, const uint32_t (&words)[4], bool transposed) {
  // Lane l names line l % 8 of matrix l / 8, and holds elements 2 (l % 4) and the next of line l / 4 of each
  // matrix.
  std::array<uint64_t, 32> lines = emulator::exchange(address), word[4];
  for (int i = 0; i < 4; ++i) word[i] = emulator::exchange(words[i]);
  if (emulator::self().number % 32) return;
  for (int matrix = 0; matrix < 4; ++matrix)
    for (int line = 0; line < 8; ++line)
      for (int column = 0; column < 8; ++column) {
        const int held_line = transposed ? column : line, held_column = transposed ? line : column;
        const uint32_t pair = static_cast<uint32_t>(word[matrix][held_line * 4 + held_column / 2]);
        const uint16_t value = static_cast<uint16_t>(held_column % 2 ? pair >> 16 : pair);
        const uint32_t to = static_cast<uint32_t>(lines[matrix * 8 + line]);
        if (to % 16)
          emulator::fail("stmatrix at shared offset %u, not a multiple of 16", to % emulator::kWindow);
        std::memcpy(emulator::at(to) + 2 * column, &value, 2);
      }
}
inline void stmatrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  store_matrix_lines(address, {a, b, c, d}, false);
}
inline void stmatrix_x4_trans(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  store_matrix_lines(address, {a, b, c, d}, true);
}
inline void store_16(void* p, uint4 v) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emulator::fail("a misaligned store of 16 bytes");
  std::memcpy(p, &v, 16);
}
inline uint32_t pack_bf16(float low, float high) {
  return uint32_t(__float2bfloat16_rn(low).bits) | uint32_t(__float2bfloat16_rn(high).bits) << 16;
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }

inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::self().product_groups.push_back(emulator::self().products); }
template <int N>
void wgmma_wait() {
  emulator::Thread& thread = emulator::self();
  const size_t groups = thread.product_groups.size();
  if (groups <= N) return;
  const size_t count = thread.product_groups[groups - 1 - N];
  emulator::Cta& cta = *thread.cta;
  emulator::Warpgroup& group = cta.warpgroups[thread.number / 128];
  emulator::execute_through(cta, group, count);
  emulator::wait_until("its products", [&group, count, &cta] {
    emulator::execute_through(cta, group, count);
    return group.executed >= count;
  });
}
template <int N>
void keep(float (&)[N]) {}
inline void order_after(float, uint32_t) {}

template <int N, int A_MN, int B_MN>
struct Wgmma {
  static void ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    emulator::issue(d, N, nullptr, a, b, A_MN, B_MN, accumulate);
  }
  static void rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    emulator::issue(d, N, a, 0, b, 0, B_MN, accumulate);
  }
};

}  // namespace nova
