// Forward: tiles of logits folded into the state of each row's softmax, over each of `splits` ranges of the
// vocabulary. 2 R D V FLOPs; bytes: w once per group of row pairs, x from L2 once per column tile.
//
// Tile 128 x 256 x 64, 4 stages, 231 KB; two consumers of 128 accumulators per thread. The four lanes that
// share a row agree on its maximum once per tile (two shuffles) and keep their own sums until an item ends,
// so that values have the same bits with and without every option.
#pragma once
#include "cuda/linear_logprob/tiles.cuh"

namespace nova {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct FoldArguments {
  const int* target_R;          // column, or anything outside [0, vocab)
  const float* inverse_norm_V;  // or null; to the end of the last tile
  float* state_5SR;  // max, sum of exp(z - max), target's logit, sum of exp(z - max)(z - max), argmax
  float* max_KR;     // STORE: the maximum so far, which the exponentials of tile k are relative to
  LogprobWork work;
  int rows, vocab, k_blocks;
  float inverse_temperature;
  bool argmax;
};

// Of one row. max and target are products before the temperature; sum and moment are this thread's columns'.
struct FoldedRow {
  float max, sum, target, moment;
  int argmax;
};

// The first of this thread's columns that holds its row's new maximum; none: a column behind all others.
NOVA_DEV void find_maximum(const float (&z)[kN / 2], const float (&top)[2], FoldedRow (&rows)[2],
                           int column) {
  bool moved[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    moved[r] = top[r] > rows[r].max;
    if (moved[r]) rows[r].argmax = 0x7fffffff;
  }
  if (!__any_sync(0xffffffff, moved[0] || moved[1])) return;
#pragma unroll
  for (int i = kN / 2 - 1; i >= 0; --i)
    if (moved[row_of(i)] && z[i] == top[row_of(i)]) rows[row_of(i)].argmax = column + column_of(i);
}

// Two chains of sums per row hide the latency of an addition. STORE: z becomes the exponentials.
template <bool ENTROPY, bool STORE>
NOVA_DEV void fold_tile(float (&z)[kN / 2], FoldedRow (&rows)[2], int column, float scale, bool argmax) {
  float top[2] = {rows[0].max, rows[1].max};
#pragma unroll
  for (int i = 0; i < kN / 2; i += 2) top[row_of(i)] = fmaxf(top[row_of(i)], fmaxf(z[i], z[i + 1]));
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2)
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffff, top[r], lanes));
  if (argmax) find_maximum(z, top, rows, column);
  // In a row of -inf alone the differences would be NaN; its sum must be 0.
  const float shift[2] = {top[0] == -INFINITY ? 0.f : top[0], top[1] == -INFINITY ? 0.f : top[1]};
  float sum[2][2] = {{0.f, 0.f}, {0.f, 0.f}}, moment[2][2] = {{0.f, 0.f}, {0.f, 0.f}};
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) {
    const int r = row_of(i);
    const float d = (z[i] - shift[r]) * scale;  // the difference first: exact for logits of 1e4 too
    const float e = exp2_fast(d);
    sum[r][i % 2] += e;
    // Clamped where e is 0 anyway, so that 0 times -inf is 0.
    if (ENTROPY) moment[r][i % 2] = fmaf(e, fmaxf(d, -1000.f), moment[r][i % 2]);
    if (STORE) z[i] = e;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float drop = (rows[r].max - shift[r]) * scale, decay = exp2_fast(drop);
    if (ENTROPY) {
      const float moved = rows[r].sum == 0.f ? 0.f : fmaf(drop, rows[r].sum, rows[r].moment);
      rows[r].moment = fmaf(moved, decay, moment[r][0] + moment[r][1]);
    }
    rows[r].sum = fmaf(rows[r].sum, decay, sum[r][0] + sum[r][1]);
    rows[r].max = top[r];
  }
}

NOVA_DEV void pick_target(const float (&z)[kN / 2], const int (&target)[2], FoldedRow (&rows)[2],
                          int column) {
#pragma unroll
  for (int i = 0; i < kN / 2; ++i)
    if (column_of(i) == target[row_of(i)] - column) rows[row_of(i)].target = z[i];
}

template <bool ENTROPY>
NOVA_DEV void write_state(const FoldArguments& a, FoldedRow (&rows)[2], int split, int first) {
  const int64_t plane = static_cast<int64_t>(a.work.order.tiles_n) * a.rows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    FoldedRow& row = rows[r];
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      row.sum += __shfl_xor_sync(0xffffffff, row.sum, lanes);
      row.target = fmaxf(row.target, __shfl_xor_sync(0xffffffff, row.target, lanes));
      if (ENTROPY) row.moment += __shfl_xor_sync(0xffffffff, row.moment, lanes);
      const int other = __shfl_xor_sync(0xffffffff, row.argmax, lanes);
      row.argmax = other < row.argmax ? other : row.argmax;
    }
    if (threadIdx.x % 4 || first + 8 * r >= a.rows) continue;
    float* out = a.state_5SR + static_cast<int64_t>(split) * a.rows + first + 8 * r;
    out[0] = row.max * a.inverse_temperature;
    out[plane] = row.sum;
    out[2 * plane] = row.target * a.inverse_temperature;
    if (ENTROPY) out[3 * plane] = row.moment * kLn2;
    if (a.argmax) out[4 * plane] = static_cast<float>(row.argmax);
  }
}

template <bool ENTROPY, bool STORE>
NOVA_DEV void fold_items(LogprobSmem& s, const CUtensorMap& map_e, const FoldArguments& a, int consumer) {
  Ring<kDepth> ring;
  float z[kN / 2];
  for (int number = blockIdx.x / 2; number < a.work.count(); number += gridDim.x / 2) {
    const LogprobItem item = a.work.at(number);
    const int top_row = tile_row(item, consumer), row = top_row + thread_row();
    const int target[2] = {row < a.rows ? a.target_R[row] : -1, row + 8 < a.rows ? a.target_R[row + 8] : -1};
    FoldedRow rows[2] = {{-INFINITY, 0.f, -INFINITY, 0.f, 0}, {-INFINITY, 0.f, -INFINITY, 0.f, 0}};
    for (int v = item.v_begin; v < item.v_end; ++v) {
      multiply(s, z, consumer, a.k_blocks, ring);
      const int column = first_column(v);
      if (a.inverse_norm_V != nullptr) scale_columns(z, a.inverse_norm_V, column);
      if ((v + 1) * kN > a.vocab) mask_tail(z, column, a.vocab);
      if (any_inside(v, target)) pick_target(z, target, rows, column);
      fold_tile<ENTROPY, STORE>(z, rows, column, a.inverse_temperature * kLog2e, a.argmax);
      if (STORE) {
        store_tile(s, z, map_e, consumer, top_row, v * kN);
        if (threadIdx.x % 4 == 0) {
          float* out = a.max_KR + static_cast<int64_t>(v) * a.rows + row;
          if (row < a.rows) out[0] = rows[0].max * a.inverse_temperature;
          if (row + 8 < a.rows) out[8] = rows[1].max * a.inverse_temperature;
        }
      }
    }
    write_state<ENTROPY>(a, rows, item.split, row);
  }
}

template <bool ENTROPY, bool STORE>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    fold_kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_w,
                const __grid_constant__ CUtensorMap map_e, const FoldArguments a) {
  NOVA_SHARED_MEMORY(LogprobSmem, s);
  init_barriers(s);
  const int group = warpgroup_index();
  if (group == 0) {
    reg_dealloc<kProducerRegisters>();
    if (threadIdx.x < 32 && elect_one()) produce(s, map_x, map_w, a.work, 0, a.k_blocks);
  } else {
    reg_alloc<kConsumerRegisters>();
    fold_items<ENTROPY, STORE>(s, map_e, a, group - 1);
  }
  leave_together();
}

}  // namespace nova
