// What the launchers do on the host. Whoever includes this has defined require, require_aligned and
// launch_kernel before: launch.cu for a GPU, the tests for the emulator.
#pragma once
#include <algorithm>
#include <string>

#include "cuda/kv_shift_rope/kernels.cuh"
#include "cuda/kv_shift_rope/launch.h"

namespace nova {

inline HeadRows rows(const HeadView& view, int heads, const char* name) {
  const auto [pointer, token_stride, head_stride] = view;
  require_aligned(pointer, 16, name);
  require(token_stride % 8 == 0 && head_stride % 8 == 0,
          std::string(name) + " has strides that are no multiples of 8 elements");
  return {reinterpret_cast<const __nv_bfloat16*>(pointer), token_stride, head_stride, heads};
}

inline HeadRowsOut rows_out(const HeadView& view, const char* name) {
  const HeadRows same = rows(view, 0, name);
  return {const_cast<__nv_bfloat16*>(same.data), same.token_stride, same.head_stride};
}

inline RopeTable table_of(const RopeTables& tables, int head_dim) {
  const auto [cos, sin, F, interleaved] = tables;
  require(head_dim >= 16 && head_dim <= 256 && head_dim % 16 == 0,
          "head_dim must be a multiple of 16 up to 256");
  require(F >= 8 && F % 8 == 0 && 2 * F <= head_dim, "F must be a multiple of 8, and 2 F at most head_dim");
  require_aligned(cos, 16, "cos_PF");
  require_aligned(sin, 16, "sin_PF");
  return {reinterpret_cast<const float*>(cos), reinterpret_cast<const float*>(sin), F, interleaved};
}

void shift_rope(const std::vector<ShiftPart>& parts, uintptr_t position_T, uintptr_t previous_T,
                const RopeTables& tables, int tokens, int head_dim, float sign, int blocks,
                uintptr_t stream) {
  const RopeTable table = table_of(tables, head_dim);
  require(!parts.empty() && parts.size() <= 3, "one to three parts");
  require(tokens >= 1, "tokens must be positive");
  require(sign == 1.f || sign == -1.f, "sign must be 1 or -1");
  require_aligned(position_T, 8, "position_T");
  require_aligned(previous_T, 8, "previous_T");
  Parts given{};
  int groups = 0;
  for (const auto& [in, out, heads, mix_X2, turns] : parts) {
    require(heads >= 1, "heads must be positive");
    require(mix_X2 == 0 || sign == 1.f, "a mix is undone by unmix");
    given.part[given.count++] = {rows(in, heads, "in"), rows_out(out, "out"),
                                 reinterpret_cast<const float*>(mix_X2), turns};
    groups += ceil_div(heads, kHeads);
  }
  const int units = head_dim / 16;
  const int64_t items = static_cast<int64_t>(groups) * units * ceil_div(tokens, kRun);
  const int64_t wanted = std::min<int64_t>((items + kForwardThreads - 1) / kForwardThreads, 0x7fffffff);
  const int grid = static_cast<int>(blocks > 0 ? std::min<int64_t>(wanted, blocks) : wanted);
  launch_kernel(shift_rope_kernel, {grid, kForwardThreads, 0, stream}, given,
                reinterpret_cast<const int64_t*>(position_T), reinterpret_cast<const int64_t*>(previous_T),
                table, tokens, units, groups, sign);
}

int unmix_blocks(int tokens) { return ceil_div(tokens, kRun * kRuns); }

void unmix(const HeadView& dy, const HeadView& x, const HeadView& dx, int heads, uintptr_t mix_X2,
           uintptr_t partial_BX2, bool turns, uintptr_t position_T, uintptr_t previous_T,
           const std::tuple<uintptr_t, uintptr_t>& offset_T1_and_tokens_J, const RopeTables& tables,
           int tokens, int head_dim, uintptr_t stream) {
  const RopeTable table = table_of(tables, head_dim);
  const auto [offset_T1, tokens_J] = offset_T1_and_tokens_J;
  require(tokens >= 1 && heads >= 1, "tokens and heads must be positive");
  require_aligned(mix_X2, 4, "mix_X2");
  require_aligned(partial_BX2, 4, "partial_BX2");
  require_aligned(position_T, 8, "position_T");
  require_aligned(previous_T, 8, "previous_T");
  require_aligned(offset_T1, 4, "offset_T1");
  const MixedPart part{rows(dy, heads, "dy"),
                       rows(x, heads, "x"),
                       rows_out(dx, "dx"),
                       reinterpret_cast<const float*>(mix_X2),
                       reinterpret_cast<float*>(partial_BX2),
                       turns};
  const int units = head_dim / 16;
  launch_kernel(unmix_kernel,
                {unmix_blocks(tokens) * ceil_div(heads, kHeads), kRuns * kHeads * units,
                 int{sizeof(MixSums)} + 1024, stream},
                part, reinterpret_cast<const int64_t*>(position_T),
                reinterpret_cast<const int64_t*>(previous_T),
                Successors{reinterpret_cast<const int*>(offset_T1), reinterpret_cast<const int*>(tokens_J)},
                table, tokens, units);
}

}  // namespace nova
