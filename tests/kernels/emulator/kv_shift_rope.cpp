// kv_shift_rope's launchers on the emulator. Errors come back as text.
#include <cstdio>

#include "cuda/common/hopper.cuh"

namespace nova {

inline unsigned seed = 0;

inline void require(bool holds, const std::string& rule) {
  if (!holds) throw std::invalid_argument(rule);
}
inline void require_aligned(uintptr_t pointer, int bytes, const char* name) {
  require(pointer != 0 && pointer % bytes == 0, std::string(name) + " is misaligned");
}

struct Launch {
  int grid, threads, shared_bytes;
  uintptr_t stream;
};
template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), const Launch& launch, const Arguments&... arguments) {
  emulator::launch(launch.grid, 1, launch.threads, seed, [&] { kernel(arguments...); });
}

}  // namespace nova

#include "cuda/kv_shift_rope/host.h"

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

nova::HeadView view(const int64_t* three) { return {static_cast<uintptr_t>(three[0]), three[1], three[2]}; }

}  // namespace

extern "C" {

void set_seed(unsigned seed) { nova::seed = seed; }

int unmix_blocks(int tokens) { return nova::unmix_blocks(tokens); }

// Per part: in (3), out (3), heads, mix_X2, turns.
void shift_rope(const int64_t* numbers, int num_parts, uintptr_t position_T, uintptr_t previous_T,
                uintptr_t cos, uintptr_t sin, int F, int interleaved, int tokens, int head_dim, float sign,
                int blocks, char* message, int size) {
  std::vector<nova::ShiftPart> parts;
  for (int i = 0; i < num_parts; ++i, numbers += 9)
    parts.push_back({view(numbers), view(numbers + 3), static_cast<int>(numbers[6]),
                     static_cast<uintptr_t>(numbers[7]), numbers[8] != 0});
  report(message, size, [&] {
    nova::shift_rope(parts, position_T, previous_T, {cos, sin, F, interleaved != 0}, tokens, head_dim, sign,
                     blocks, 0);
  });
}

// dy, x, dx (3 each), heads, mix_X2, partial_BX2, turns, offset_T1, tokens_J.
void unmix(const int64_t* n, uintptr_t position_T, uintptr_t previous_T, uintptr_t cos, uintptr_t sin, int F,
           int interleaved, int tokens, int head_dim, char* message, int size) {
  report(message, size, [&] {
    nova::unmix(view(n), view(n + 3), view(n + 6), static_cast<int>(n[9]), static_cast<uintptr_t>(n[10]),
                static_cast<uintptr_t>(n[11]), n[12] != 0, position_T, previous_T,
                {static_cast<uintptr_t>(n[13]), static_cast<uintptr_t>(n[14])},
                {cos, sin, F, interleaved != 0}, tokens, head_dim, 0);
  });
}

}  // extern "C"
