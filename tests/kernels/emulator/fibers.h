// A CPU stand-in for a GPU's threads: one fiber per CUDA thread, all CTAs of a cluster at once, switched
// where a thread waits. The order in which threads run, and when asynchronous copies and products land, is
// drawn from a seed; nothing here is parallel.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace nova::emulator {

constexpr uint32_t kWindow =
    1 << 18;  // bytes of a CTA's shared memory window; smem addresses are rank * kWindow + offset
constexpr uint32_t kBase =
    16;  // dynamic shared memory starts here: 16-byte alignment is all that is promised
constexpr size_t kStack = 256 << 10;

[[noreturn]] inline void fail(const char* format, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw std::runtime_error(text);
}

struct Barrier {  // an mbarrier
  int count = 0, pending = 0, phase = 0;
  int64_t bytes = 0;  // expected and not yet arrived

  void settle() {
    if (pending == 0 && bytes == 0) {
      pending = count;
      phase ^= 1;
    }
  }
};

struct NamedBarrier {
  int arrived = 0, generation = 0, threads = 0;
};

struct WarpExchange {  // one collective of a warp; two take turns
  int64_t number = -1;
  int arrived = 0;
  uint64_t value[32];
};

struct Product {  // one wgmma of a warpgroup
  int columns = 0, issued = 0;
  bool done = false, a_in_registers = false;
  int a_mn = 0, b_mn = 0, accumulate = 0;
  uint64_t a = 0, b = 0;
  std::vector<float*> d;
  std::vector<std::array<uint32_t, 4>> a_registers;
};

struct Warpgroup {
  std::vector<Product> products;
  size_t executed = 0;  // in order
};

struct Cta;

struct Thread {
  uint3 index{};
  Cta* cta = nullptr;
  int number = 0;  // within the CTA
  ucontext_t context{};
  std::unique_ptr<char[]> stack;
  bool finished = true;
  const char* waiting_for = nullptr;
  std::function<bool()> ready;
  int64_t collectives = 0;
  size_t products = 0;                 // wgmma issued
  std::vector<size_t> product_groups;  // how many were issued at each commit
  std::vector<std::shared_ptr<int>>
      store_groups;  // stores of each committed group that have not read their source
  std::shared_ptr<int> open_group;
};

struct Cta {
  uint3 index{};
  uint32_t rank = 0;
  std::unique_ptr<uint8_t, void (*)(void*)> memory{nullptr, std::free};
  std::map<uint32_t, Barrier> barriers;
  NamedBarrier named[16];
  std::vector<WarpExchange> exchanges;
  std::vector<Warpgroup> warpgroups;
  int running = 0;
};

struct Pending {  // an asynchronous copy that has not landed
  std::function<void()> land;
};

struct Machine {
  std::mt19937 random;
  double eagerness = 0.5;  // chance of an asynchronous operation to land at each opportunity
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Cta> ctas;  // of the cluster that runs
  std::vector<Pending> pending;
  NamedBarrier cluster_barrier;
  dim3 grid, block;
  ucontext_t scheduler{};
  Thread* self = nullptr;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;

  bool chance() { return std::uniform_real_distribution<double>()(random) < eagerness; }
};

inline Machine machine;

inline Thread& self() { return *machine.self; }

// Runs other threads until `ready` holds. `what` names the wait in the report of a deadlock.
inline void wait_until(const char* what, std::function<bool()> ready) {
  Thread& thread = self();
  if (machine.chance() && ready()) return;  // or let the others run first
  thread.waiting_for = what;
  thread.ready = std::move(ready);
  swapcontext(&thread.context, &machine.scheduler);
  thread.ready = nullptr;
}

inline void entry() {
  try {
    (*machine.body)();
  } catch (...) {
    if (!machine.error) machine.error = std::current_exception();
  }
  Thread& thread = self();
  thread.finished = true;
  --thread.cta->running;
  swapcontext(&thread.context, &machine.scheduler);
}

inline std::string deadlock() {
  std::map<std::string, std::pair<int, std::string>> waits;
  for (auto& thread : machine.threads) {
    if (thread->finished) continue;
    auto& [count, first] = waits[thread->waiting_for ? thread->waiting_for : "nothing"];
    if (count++ == 0)
      first = "thread " + std::to_string(thread->number) + " of CTA " + std::to_string(thread->cta->index.x);
  }
  std::string text = "deadlock:";
  for (auto& [what, who] : waits) {
    text += " " + std::to_string(who.first) + " threads wait for " + what + " (first: " + who.second + ");";
  }
  return text;
}

inline void land_some(bool all_blocked) {
  std::vector<Pending> kept, landing;
  for (auto& operation : machine.pending) (machine.chance() ? landing : kept).push_back(std::move(operation));
  if (landing.empty() && all_blocked && !kept.empty()) {  // whichever comes first
    const size_t which = machine.random() % kept.size();
    landing.push_back(std::move(kept[which]));
    kept.erase(kept.begin() + which);
  }
  machine.pending = std::move(kept);
  for (auto& operation : landing) operation.land();
}

// Runs the threads of one cluster to their ends.
inline void run_cluster() {
  std::vector<size_t> order(machine.threads.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  while (true) {
    std::shuffle(order.begin(), order.end(), machine.random);
    bool progress = false, alive = false;
    for (size_t i : order) {
      Thread& thread = *machine.threads[i];
      if (thread.finished) continue;
      alive = true;
      if (thread.ready && !thread.ready()) continue;
      progress = true;
      machine.self = &thread;
      swapcontext(&machine.scheduler, &thread.context);
      if (machine.error) std::rethrow_exception(machine.error);
    }
    if (!alive) break;
    const size_t before = machine.pending.size();
    land_some(!progress);
    if (!progress && before == 0) throw std::runtime_error(deadlock());
  }
  while (!machine.pending.empty()) land_some(true);
}

// Launches `body` as a kernel: `grid` CTAs of `threads`, `cluster` of them at a time.
inline void launch(int grid, int cluster, int threads, unsigned seed, const std::function<void()>& body) {
  if (grid % cluster || threads % 32) fail("grid %d, cluster %d, threads %d", grid, cluster, threads);
  machine.random.seed(seed);
  machine.eagerness = seed % 3 == 0 ? 0.5 : seed % 3 == 1 ? 0.95 : 0.05;
  machine.grid = dim3(grid);
  machine.block = dim3(threads);
  machine.body = &body;
  machine.error = nullptr;
  machine.pending.clear();
  machine.threads.resize(cluster * threads);
  std::vector<int> clusters(grid / cluster);
  for (size_t i = 0; i < clusters.size(); ++i) clusters[i] = static_cast<int>(i);
  std::shuffle(clusters.begin(), clusters.end(), machine.random);
  for (int number : clusters) {
    machine.ctas.clear();
    machine.ctas.resize(cluster);
    machine.cluster_barrier = {};
    for (int rank = 0; rank < cluster; ++rank) {
      Cta& cta = machine.ctas[rank];
      cta.index = {static_cast<unsigned>(number * cluster + rank), 0, 0};
      cta.rank = rank;
      cta.memory.reset(static_cast<uint8_t*>(std::aligned_alloc(1024, kWindow)));
      std::memset(cta.memory.get(), 0xff, kWindow);  // NaN
      cta.exchanges.resize(2 * threads / 32);
      cta.warpgroups.resize((threads + 127) / 128);
      cta.running = threads;
      for (int i = 0; i < threads; ++i) {
        auto& slot = machine.threads[rank * threads + i];
        auto stack = slot ? std::move(slot->stack) : std::unique_ptr<char[]>(new char[kStack]);
        slot = std::make_unique<Thread>();
        slot->stack = std::move(stack);
        slot->index = {static_cast<unsigned>(i), 0, 0};
        slot->number = i;
        slot->cta = &cta;
        slot->finished = false;
        getcontext(&slot->context);
        slot->context.uc_stack.ss_sp = slot->stack.get();
        slot->context.uc_stack.ss_size = kStack;
        slot->context.uc_link = &machine.scheduler;
        makecontext(&slot->context, entry, 0);
      }
    }
    run_cluster();
  }
}

}  // namespace nova::emulator
