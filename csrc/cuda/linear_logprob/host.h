// What the launchers do on the host: check, describe the tensors, choose the kernel. Whoever includes this
// has defined require, require_aligned, map_matrix_bf16 and launch_kernel before: launch.cu for a GPU, the
// tests for the emulator.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/linear_logprob/kernels.cuh"
#include "cuda/linear_logprob/launch.h"

namespace nova {

template <class Use>
void with_flag(bool flag, const Use& use) {
  if (flag) {
    use(std::true_type());
  } else {
    use(std::false_type());
  }
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline void require_sizes(int rows, int vocab) {
  require(rows >= 1 && rows <= 0x7fffffff - 2 * kM,
          "rows must be positive, and an int32 with a pair of tiles");
  require(vocab >= 1 && vocab <= 0x7fffffff - kN, "vocab must be positive, and an int32 with one more tile");
}

inline void require_product(uintptr_t x_RD, uintptr_t w_VD, int dim, int group, int clusters,
                            float temperature) {
  require_aligned(x_RD, 16, "x_RD");
  require_aligned(w_VD, 16, "w_VD");
  require(dim >= 8 && dim % 8 == 0,
          "dim must be a positive multiple of 8, so that rows start at multiples of 16 bytes");
  require(group >= 1 && clusters >= 1, "group and clusters must be positive");
  require(std::isfinite(temperature) && temperature > 0.f, "inverse_temperature must be positive and finite");
}

inline void require_wave(uintptr_t dz_RW, int vocab, int width, int wave_start, int wave_tiles) {
  require_aligned(dz_RW, 16, "dz_RW");
  require(wave_start >= 0 && wave_start % kN == 0 && wave_start < vocab,
          "wave_start must be a multiple of 256 below vocab");
  require(wave_tiles >= 1 && wave_tiles <= ceil_div(vocab - wave_start, kN),
          "wave_tiles must be positive and end with the vocabulary's last tile");
  require(wave_tiles <= 32768, "wave_tiles must be at most 32768");
  require(width % 8 == 0 && width / kN >= wave_tiles,
          "width must be a multiple of 8 that holds wave_tiles tiles of 256");
}

inline int grid_of(const LogprobWork& work, int clusters) { return 2 * std::min(work.count(), clusters); }

void linear_logprob_fold(uintptr_t x_RD, uintptr_t w_VD, uintptr_t target_R, uintptr_t inverse_norm_V,
                         uintptr_t state_5SR, uintptr_t e_RV, uintptr_t max_KR, int rows, int dim, int vocab,
                         int splits, int group, int clusters, float inverse_temperature, bool entropy,
                         bool argmax, uintptr_t stream) {
  require_sizes(rows, vocab);
  require_product(x_RD, w_VD, dim, group, clusters, inverse_temperature);
  require_aligned(target_R, 4, "target_R");
  require_aligned(state_5SR, 4, "state_5SR");
  require((e_RV == 0) == (max_KR == 0), "e_RV and max_KR are given together or not at all");
  require(inverse_norm_V % 8 == 0 && e_RV % 16 == 0 && max_KR % 4 == 0,
          "inverse_norm_V, e_RV or max_KR is misaligned");
  const int v_tiles = ceil_div(vocab, kN);
  require(splits >= 1 && splits <= v_tiles, "splits must be between 1 and the tiles of 256 columns");
  require(int64_t{v_tiles} * splits <= 0x7fffffff, "splits times the tiles of 256 columns must be an int32");
  const CUtensorMap map_x = map_matrix_bf16(pointer<void>(x_RD), rows, dim, kM);
  const CUtensorMap map_w = map_matrix_bf16(pointer<void>(w_VD), vocab, dim, kHalfN);
  const CUtensorMap map_e =
      e_RV == 0 ? map_x : map_matrix_bf16(pointer<void>(e_RV), rows, int64_t{v_tiles} * kN, 64);
  FoldArguments a{};
  a.target_R = pointer<const int>(target_R);
  a.inverse_norm_V = pointer<const float>(inverse_norm_V);
  a.state_5SR = pointer<float>(state_5SR);
  a.max_KR = pointer<float>(max_KR);
  a.work = logprob_work(rows, v_tiles, splits, group);
  a.rows = rows;
  a.vocab = vocab;
  a.k_blocks = ceil_div(dim, kK);
  a.inverse_temperature = inverse_temperature;
  a.argmax = argmax;
  with_flag(entropy, [&](auto with_entropy) {
    with_flag(e_RV != 0, [&](auto with_store) {
      launch_kernel(fold_kernel<decltype(with_entropy)::value, decltype(with_store)::value>,
                    {grid_of(a.work, clusters), 2, kThreads, kLogprobSmemBytes, stream}, map_x, map_w, map_e,
                    a);
    });
  });
}

void linear_logprob_dlogits(uintptr_t x_RD, uintptr_t w_VD, uintptr_t target_R, uintptr_t inverse_norm_V,
                            uintptr_t rows_8R, uintptr_t dz_RW, int rows, int dim, int vocab, int width,
                            int wave_start, int wave_tiles, int group, int clusters,
                            float inverse_temperature, bool extras, uintptr_t stream) {
  require_sizes(rows, vocab);
  require_product(x_RD, w_VD, dim, group, clusters, inverse_temperature);
  require_wave(dz_RW, vocab, width, wave_start, wave_tiles);
  require_aligned(target_R, 4, "target_R");
  require_aligned(rows_8R, 4, "rows_8R");
  require(inverse_norm_V % 8 == 0, "inverse_norm_V is misaligned");
  const CUtensorMap map_x = map_matrix_bf16(pointer<void>(x_RD), rows, dim, kM);
  const CUtensorMap map_w = map_matrix_bf16(pointer<void>(w_VD), vocab, dim, kHalfN);
  const CUtensorMap map_dz = map_matrix_bf16(pointer<void>(dz_RW), rows, width, 64);
  DlogitsArguments a{};
  a.target_R = pointer<const int>(target_R);
  a.inverse_norm_V = pointer<const float>(inverse_norm_V);
  a.rows_8R = pointer<const float>(rows_8R);
  a.work = logprob_work(rows, wave_tiles, wave_tiles, group);
  a.rows = rows;
  a.vocab = vocab;
  a.wave_start = wave_start;
  a.k_blocks = ceil_div(dim, kK);
  a.inverse_temperature = inverse_temperature;
  with_flag(extras, [&](auto with_extras) {
    launch_kernel(dlogits_kernel<decltype(with_extras)::value>,
                  {grid_of(a.work, clusters), 2, kThreads, kLogprobSmemBytes, stream}, map_x, map_w, map_dz,
                  a);
  });
}

void linear_logprob_stored_dlogits(uintptr_t e_RV, uintptr_t max_KR, uintptr_t target_R,
                                   uintptr_t inverse_norm_V, uintptr_t rows_8R, uintptr_t dz_RW, int rows,
                                   int vocab, int width, int wave_start, int wave_tiles, bool extras,
                                   uintptr_t stream) {
  require_sizes(rows, vocab);
  require_wave(dz_RW, vocab, width, wave_start, wave_tiles);
  require_aligned(e_RV, 16, "e_RV");
  require_aligned(max_KR, 4, "max_KR");
  require_aligned(target_R, 4, "target_R");
  require_aligned(rows_8R, 4, "rows_8R");
  require(inverse_norm_V % 8 == 0, "inverse_norm_V is misaligned");
  const int64_t blocks = int64_t{wave_tiles} * ceil_div(rows, kStoredRows);
  require(blocks <= 0x7fffffff, "rows times wave_tiles is too large for one launch");
  DlogitsArguments a{};
  a.target_R = pointer<const int>(target_R);
  a.inverse_norm_V = pointer<const float>(inverse_norm_V);
  a.rows_8R = pointer<const float>(rows_8R);
  a.work = logprob_work(rows, wave_tiles, wave_tiles, 1);
  a.rows = rows;
  a.vocab = vocab;
  a.wave_start = wave_start;
  const int64_t stride_e = int64_t{ceil_div(vocab, kN)} * kN;
  with_flag(extras, [&](auto with_extras) {
    launch_kernel(stored_dlogits_kernel<decltype(with_extras)::value>,
                  {static_cast<int>(blocks), 1, 32 * kStoredRows, 0, stream}, pointer<const uint4>(e_RV),
                  pointer<uint4>(dz_RW), pointer<const float>(max_KR), stride_e, int64_t{width}, a);
  });
}

}  // namespace nova
