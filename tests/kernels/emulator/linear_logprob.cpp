// linear_logprob's launchers on the emulator, with all that they do on the host. Errors come back as text.
#include <cstdio>

#include "cuda/common/hopper.cuh"

int nova_mutant = 0;  // which of the changes of a mutated copy is on

namespace nova {

inline unsigned seed = 0;

inline void require(bool holds, const char* rule) {
  if (!holds) throw std::invalid_argument(rule);
}
inline void require_aligned(uintptr_t pointer, int bytes, const char* name) {
  require(pointer != 0 && pointer % bytes == 0, name);
}
inline CUtensorMap map_matrix_bf16(const void* base, int64_t rows, int64_t cols, int box_rows) {
  if (cols * 2 % 16 || reinterpret_cast<uintptr_t>(base) % 16 || box_rows > 256) {
    throw std::runtime_error("the driver would refuse this tensor map");
  }
  return {static_cast<const uint8_t*>(base), 2, 2, 128, {cols, rows}, {2, 2 * cols}, {64, box_rows}};
}

struct Launch {
  int grid, cluster, threads, shared_bytes;
  uintptr_t stream;
};
template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), const Launch& launch, const Arguments&... arguments) {
  emulator::launch(launch.grid, launch.cluster, launch.threads, seed, [&] { kernel(arguments...); });
}

}  // namespace nova

#include "cuda/linear_logprob/host.h"

namespace {

template <class Call>
void report(char* message, int size, const Call& call) {
  message[0] = 0;
  try {
    call();
  } catch (const std::exception& error) {
    std::snprintf(message, size, "%s", error.what());
  }
}

}  // namespace

extern "C" {

void set_run(unsigned seed, int mutant) {
  nova::seed = seed;
  nova_mutant = mutant;
}

void linear_logprob_fold(uintptr_t x_RD, uintptr_t w_VD, uintptr_t target_R, uintptr_t inverse_norm_V,
                         uintptr_t state_5SR, uintptr_t e_RV, uintptr_t max_KR, int rows, int dim, int vocab,
                         int splits, int group, int clusters, float inverse_temperature, int entropy,
                         int argmax, char* message, int size) {
  report(message, size, [&] {
    nova::linear_logprob_fold(x_RD, w_VD, target_R, inverse_norm_V, state_5SR, e_RV, max_KR, rows, dim, vocab,
                              splits, group, clusters, inverse_temperature, entropy, argmax, 0);
  });
}

void linear_logprob_dlogits(uintptr_t x_RD, uintptr_t w_VD, uintptr_t target_R, uintptr_t inverse_norm_V,
                            uintptr_t rows_8R, uintptr_t dz_RW, int rows, int dim, int vocab, int width,
                            int wave_start, int wave_tiles, int group, int clusters,
                            float inverse_temperature, int extras, char* message, int size) {
  report(message, size, [&] {
    nova::linear_logprob_dlogits(x_RD, w_VD, target_R, inverse_norm_V, rows_8R, dz_RW, rows, dim, vocab,
                                 width, wave_start, wave_tiles, group, clusters, inverse_temperature, extras,
                                 0);
  });
}

void linear_logprob_stored_dlogits(uintptr_t e_RV, uintptr_t max_KR, uintptr_t target_R,
                                   uintptr_t inverse_norm_V, uintptr_t rows_8R, uintptr_t dz_RW, int rows,
                                   int vocab, int width, int wave_start, int wave_tiles, int extras,
                                   char* message, int size) {
  report(message, size, [&] {
    nova::linear_logprob_stored_dlogits(e_RV, max_KR, target_R, inverse_norm_V, rows_8R, dz_RW, rows, vocab,
                                        width, wave_start, wave_tiles, extras, 0);
  });
}

// items_N4 gets every item (pair, split, first and last tile); returns how many there are.
int linear_logprob_work(int rows, int v_tiles, int splits, int group, int* items_N4) {
  const nova::LogprobWork work = nova::logprob_work(rows, v_tiles, splits, group);
  for (int number = 0; number < work.count(); ++number) {
    const nova::LogprobItem item = work.at(number);
    const int values[4] = {item.pair, item.split, item.v_begin, item.v_end};
    std::copy_n(values, 4, items_N4 + 4 * number);
  }
  return work.count();
}
}
