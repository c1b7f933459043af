// Backward: dz = d loss / d (x w^T) of one wave of columns, formed in fp32 and rounded once to bf16:
//     dz = g (onehot_target - p) - h p (log p + entropy) + k onehot_argmax
//
//     dlogits_kernel         p from the logits, which are computed once more (plan "recompute"): the
//     forward's
//                            main loop, tile and barriers; dz leaves by stmatrix and TMA
//     stored_dlogits_kernel  p from the exponentials that the forward kept (plan "store"): 4 bytes per
//     element,
//                            no products; the target's p comes from its fp32 logit, so that 1 - p keeps its
//                            digits
#pragma once
#include "cuda/linear_logprob/fold.cuh"

namespace nova {

struct DlogitsArguments {
  const int* target_R;          // column, or anything outside [0, vocab)
  const float* inverse_norm_V;  // or null; to the end of the last tile
  const float* rows_8R;  // max, log2 of the sum, target's logit, g, h, entropy, k, argmax; g, h, k with the
                         // temperature divided out, 0 in ignored rows
  LogprobWork work;      // one range per column tile of the wave
  int rows, vocab, k_blocks, wave_start;
  float inverse_temperature;
};

// What dz needs of one row. dz = -p (base + slope log2 p), + g at the target, + k at the argmax. Without
// EXTRAS (the gradients of entropy and maximum) only base = g and the target.
struct RowTerms {
  float max, log2_sum, target_logit, g, base, slope, k;
  int target, argmax;
};

template <bool EXTRAS>
NOVA_DEV RowTerms row_terms(const DlogitsArguments& a, int row) {
  RowTerms t{0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, -1, -1};
  if (row >= a.rows) return t;
  const int64_t plane = a.rows;
  const float* in = a.rows_8R + row;
  t.max = in[0];
  t.log2_sum = in[plane];
  t.target_logit = in[2 * plane];
  t.g = t.base = in[3 * plane];
  if (EXTRAS) {
    const float h = in[4 * plane];
    t.base = fmaf(h, in[5 * plane], t.g);
    t.slope = h * kLn2;
    t.k = in[6 * plane];
    t.argmax = static_cast<int>(in[7 * plane]);
  }
  t.target = a.target_R[row];
  return t;
}

// From p and log2 p at `column`, from which t's columns count. log2 p is clamped where p is 0 anyway, so that
// 0 times -inf is 0; a NaN stays in p. One add per element is cheaper than to look for tiles with a target:
// the exponentials set the pace.
template <bool EXTRAS>
NOVA_DEV float dlogit(float p, float log2_p, const RowTerms& t, int column) {
  float dz = -p * (EXTRAS ? fmaf(t.slope, fmaxf(log2_p, -1000.f), t.base) : t.base);
  if (column == t.target) dz += t.g;
  if (EXTRAS && column == t.argmax) dz += t.k;
  return dz;
}

template <bool EXTRAS>
NOVA_DEV void dlogits_items(LogprobSmem& s, const CUtensorMap& map_dz, const DlogitsArguments& a,
                            int consumer) {
  Ring<kDepth> ring;
  float z[kN / 2];
  for (int number = blockIdx.x / 2; number < a.work.count(); number += gridDim.x / 2) {
    const LogprobItem item = a.work.at(number);
    const int top_row = tile_row(item, consumer), row = top_row + thread_row();
    const int v = a.wave_start / kN + item.split, column = first_column(v);
    RowTerms t[2] = {row_terms<EXTRAS>(a, row), row_terms<EXTRAS>(a, row + 8)};
#pragma unroll
    for (int r = 0; r < 2; ++r) t[r].target -= column, t[r].argmax -= column;
    multiply(s, z, consumer, a.k_blocks, ring);
    if (a.inverse_norm_V != nullptr) scale_columns(z, a.inverse_norm_V, column);
    if ((v + 1) * kN > a.vocab) mask_tail(z, column, a.vocab);
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      const RowTerms& of = t[row_of(i)];
      const float log2_p = fmaf(fmaf(z[i], a.inverse_temperature, -of.max), kLog2e, -of.log2_sum);
      z[i] = dlogit<EXTRAS>(exp2_fast(log2_p), log2_p, of, column_of(i));
    }
    if (a.inverse_norm_V != nullptr) scale_columns(z, a.inverse_norm_V, column);
    store_tile(s, z, map_dz, consumer, top_row, item.split * kN);
  }
}

template <bool EXTRAS>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    dlogits_kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_w,
                   const __grid_constant__ CUtensorMap map_dz, const DlogitsArguments a) {
  NOVA_SHARED_MEMORY(LogprobSmem, s);
  init_barriers(s);
  const int group = warpgroup_index();
  if (group == 0) {
    reg_dealloc<kProducerRegisters>();
    if (threadIdx.x < 32 && elect_one()) produce(s, map_x, map_w, a.work, a.wave_start, a.k_blocks);
  } else {
    reg_alloc<kConsumerRegisters>();
    dlogits_items<EXTRAS>(s, map_dz, a, group - 1);
  }
  leave_together();
}

constexpr int kStoredRows = 8;  // per block: one warp per row and column tile, 8 columns per lane

// e_RV and dz_RW consist of whole tiles; strides in elements. Block i: column tile i % wave tiles.
template <bool EXTRAS>
__global__ void __launch_bounds__(32 * kStoredRows)
    stored_dlogits_kernel(const uint4* __restrict__ e_RV, uint4* __restrict__ dz_RW,
                          const float* __restrict__ max_KR, int64_t stride_e, int64_t stride_dz,
                          const DlogitsArguments a) {
  const int tile = blockIdx.x % a.work.order.tiles_n, v = a.wave_start / kN + tile;
  const int row = blockIdx.x / a.work.order.tiles_n * kStoredRows + threadIdx.x / 32;
  if (row >= a.rows) return;
  const int lane = threadIdx.x % 32, column = v * kN + 8 * lane;
  RowTerms t = row_terms<EXTRAS>(a, row);
  t.target -= column, t.argmax -= column;
  const uint4 packed = __ldg(e_RV + (row * stride_e + column) / 8);
  const float shift = fmaf(max_KR[static_cast<int64_t>(v) * a.rows + row] - t.max, kLog2e, -t.log2_sum);
  const float sure = fmaf(t.target_logit - t.max, kLog2e, -t.log2_sum), factor = exp2_fast(shift);
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
  float dz[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float e = __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    const float p = i == t.target ? exp2_fast(sure) : e * factor;
    const float log2_p = !EXTRAS ? 0.f : i == t.target ? sure : log2_fast(e) + shift;
    dz[i] = dlogit<EXTRAS>(p, log2_p, t, i);
    if (a.inverse_norm_V != nullptr) dz[i] *= a.inverse_norm_V[column + i];
  }
  dz_RW[(row * stride_dz + tile * kN + 8 * lane) / 8] = make_uint4(
      pack_bf16(dz[0], dz[1]), pack_bf16(dz[2], dz[3]), pack_bf16(dz[4], dz[5]), pack_bf16(dz[6], dz[7]));
}

}  // namespace nova
