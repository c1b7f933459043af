// kv_shift_rope: keys and values mixed with the previous token's, queries and keys turned by their positions.
// Bound by bytes: every element of q, k and v is read once and written once.
//
// A *unit* is the 32 bytes of a head row that one thread handles: two chunks of 8 elements which hold both
// members of 8 rotary pairs. A thread walks a run of kRun tokens and carries the raw chunks of the token
// before, so a previous row is read again only where a segment starts. It does so for kHeads heads at a time:
// their loads are in flight together, and the cosines and sines are loaded once for all of them.
//
// T tokens, N query heads, K key/value heads, X either; H head dim, U = H / 16 units, F rotary_dim / 2.
#pragma once
#include "cuda/common/hopper.cuh"

namespace nova {

constexpr int kRun = 8;    // tokens that a thread walks
constexpr int kHeads = 4;  // heads that it does at a time, forward; heads of a block, backward
constexpr int kRuns = 8;   // runs of a block, backward
constexpr int kForwardThreads = 128;

struct RopeTable {
  const float *cos, *sin;  // (positions, F)
  int F;
  bool interleaved;  // pairs are dims (2i, 2i + 1), not (i, i + F)
};

struct HeadRows {  // (T, X, H) bf16; strides in elements
  const __nv_bfloat16* data;
  int64_t token_stride, head_stride;
  int heads;
};

struct HeadRowsOut {
  __nv_bfloat16* data;
  int64_t token_stride, head_stride;
};

struct Chunks {  // one unit of a row
  uint4 a, b;
};

struct Values {  // the same in fp32
  float a[8], b[8];
};

// Where unit u's two chunks begin in a head row, in elements.
NOVA_HD int first_chunk(int u, const RopeTable& table) {
  const int rotary_units = table.F / 8;
  return table.interleaved ? 16 * u : u < rotary_units ? 8 * u : 2 * table.F + 16 * (u - rotary_units);
}
NOVA_HD int second_chunk(int u, const RopeTable& table) {
  return !table.interleaved && u < table.F / 8 ? 8 * u + table.F : first_chunk(u, table) + 8;
}

NOVA_DEV Chunks load_unit(const __nv_bfloat16* row, int first, int second) {
  return {__ldg(reinterpret_cast<const uint4*>(row + first)),
          __ldg(reinterpret_cast<const uint4*>(row + second))};
}

NOVA_DEV void widen(const uint4& chunk, float (&x)[8]) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
NOVA_DEV Values widen(const Chunks& chunks) {
  Values x;
  widen(chunks.a, x.a);
  widen(chunks.b, x.b);
  return x;
}
NOVA_DEV uint4 narrow(const float (&x)[8]) {
  return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                    pack_bf16(x[6], x[7]));
}
NOVA_DEV void store_unit(__nv_bfloat16* row, int first, int second, const Values& x) {
  store_16(row + first, narrow(x.a));
  store_16(row + second, narrow(x.b));
}

// Cosines and sines of unit u's 8 pairs; the identity behind the rotary dims. sign = -1 turns back.
struct Turn {
  float cos[8], sin[8];
};
NOVA_DEV Turn load_turn(const RopeTable& table, int64_t position, int u, float sign) {
  Turn turn;
  if (u >= table.F / 8) {
#pragma unroll
    for (int i = 0; i < 8; ++i) turn.cos[i] = 1.f, turn.sin[i] = 0.f;
    return turn;
  }
  const float4* cos = reinterpret_cast<const float4*>(table.cos + position * table.F + 8 * u);
  const float4* sin = reinterpret_cast<const float4*>(table.sin + position * table.F + 8 * u);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float4 c = __ldg(cos + i), s = __ldg(sin + i);
    turn.cos[4 * i] = c.x, turn.cos[4 * i + 1] = c.y, turn.cos[4 * i + 2] = c.z, turn.cos[4 * i + 3] = c.w;
    turn.sin[4 * i] = sign * s.x, turn.sin[4 * i + 1] = sign * s.y;
    turn.sin[4 * i + 2] = sign * s.z, turn.sin[4 * i + 3] = sign * s.w;
  }
  return turn;
}
NOVA_DEV void turn_pair(float& x, float& y, float cos, float sin) {
  const float turned = x * cos - y * sin;
  y = y * cos + x * sin;
  x = turned;
}
NOVA_DEV void apply(const Turn& turn, bool interleaved, Values& x) {
  if (interleaved) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      turn_pair(x.a[2 * i], x.a[2 * i + 1], turn.cos[i], turn.sin[i]);
      turn_pair(x.b[2 * i], x.b[2 * i + 1], turn.cos[4 + i], turn.sin[4 + i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) turn_pair(x.a[i], x.b[i], turn.cos[i], turn.sin[i]);
  }
}

// One of q, k, v of a launch. mix: (X, 2) weights of the previous and the current row, or null; turns:
// whether positions turn it.
struct Part {
  HeadRows in;
  HeadRowsOut out;
  const float* mix_X2;
  bool turns;
};
struct Parts {
  Part part[3];
  int count;
};

NOVA_DEV void walk(const Part& part, int head, int u, int first_token, int end, const int64_t* position_T,
                   const int64_t* previous_T, const RopeTable& table, float sign) {
  const int first = first_chunk(u, table), second = second_chunk(u, table);
  const int heads = min(kHeads, part.in.heads - head);
  const __nv_bfloat16* in = part.in.data + head * part.in.head_stride;
  __nv_bfloat16* out = part.out.data + head * part.out.head_stride;
  Chunks carried[kHeads];
  for (int t = first_token; t < end; ++t) {
    const Turn turn = load_turn(table, part.turns ? position_T[t] : 0, part.turns ? u : table.F, sign);
    const int64_t previous = part.mix_X2 != nullptr ? previous_T[t] : -1;
    Chunks current[kHeads];
#pragma unroll
    for (int j = 0; j < kHeads; ++j)
      if (j < heads)
        current[j] = load_unit(in + t * part.in.token_stride + j * part.in.head_stride, first, second);
    if (previous >= 0 && (previous != t - 1 || t == first_token)) {
#pragma unroll
      for (int j = 0; j < kHeads; ++j)
        if (j < heads)
          carried[j] =
              load_unit(in + previous * part.in.token_stride + j * part.in.head_stride, first, second);
    }
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      if (j >= heads) break;
      Values x = widen(current[j]);
      if (part.mix_X2 != nullptr) {
        const float before = __ldg(part.mix_X2 + 2 * (head + j)),
                    now = __ldg(part.mix_X2 + 2 * (head + j) + 1);
        const Values p = widen(carried[j]);
#pragma unroll
        for (int i = 0; i < 8; ++i) {  // a row that does not exist is not read: 0 times NaN is NaN
          x.a[i] = now * x.a[i] + (previous >= 0 ? before * p.a[i] : 0.f);
          x.b[i] = now * x.b[i] + (previous >= 0 ? before * p.b[i] : 0.f);
        }
        carried[j] = current[j];
      }
      apply(turn, table.interleaved, x);
      store_unit(out + t * part.out.token_stride + j * part.out.head_stride, first, second, x);
    }
  }
}

// Forward, sign 1; or, without mixes, the backward of a rotation, sign -1. Items: runs of tokens times groups
// of heads times units; units innermost, so that the threads of a warp read whole lines.
__global__ void __launch_bounds__(kForwardThreads)
    shift_rope_kernel(const __grid_constant__ Parts parts, const int64_t* __restrict__ position_T,
                      const int64_t* __restrict__ previous_T, const __grid_constant__ RopeTable table,
                      int tokens, int units, int groups, float sign) {
  const int64_t per_run = static_cast<int64_t>(groups) * units;
  const int64_t items = per_run * ceil_div(tokens, kRun);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < items;
       item += stride) {
    const int first_token = static_cast<int>(item / per_run) * kRun;
    const int in_run = static_cast<int>(item % per_run);
    int group = in_run / units, which = 0;
    while (group >= ceil_div(parts.part[which].in.heads, kHeads)) {
      group -= ceil_div(parts.part[which].in.heads, kHeads);
      ++which;
    }
    walk(parts.part[which], group * kHeads, in_run % units, first_token, min(first_token + kRun, tokens),
         position_T, previous_T, table, sign);
  }
}

// Backward of a mixed part: dx[t] = now * turned back dy[t] + before * turned back sum of dy[u] over the u
// that follow t. All of these stand at position[t] + 1, so they are added first. The same two vectors times
// x[t] are the mix's gradients: no previous row is read.
struct MixedPart {
  HeadRows dy, x;
  HeadRowsOut dx;
  const float* mix_X2;
  float* partial_BX2;  // per block of kRun * kRuns tokens, head and mix: the block depends on nothing but the
                       // token
  bool turns;
};
struct Successors {  // branches behind the last token of a prefix: tokens_J[offset_T1[t]] up to
                     // tokens_J[offset_T1[t + 1]]
  const int *offset_T1, *tokens_J;
};

struct alignas(16) MixSums {
  float sum[2][kHeads][kRuns * 16];  // by mix, head, run and unit
};

NOVA_DEV void add(Values& sum, const Chunks& chunks) {
  const Values x = widen(chunks);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum.a[i] += x.a[i], sum.b[i] += x.b[i];
}
NOVA_DEV float dot(const Values& x, const Values& y) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += x.a[i] * y.a[i] + x.b[i] * y.b[i];
  return sum;
}

// blockIdx.x: block of tokens and group of heads; threads: runs x heads x units.
__global__ void __launch_bounds__(kRuns * kHeads * 16)
    unmix_kernel(const __grid_constant__ MixedPart part, const int64_t* __restrict__ position_T,
                 const int64_t* __restrict__ previous_T, const __grid_constant__ Successors successors,
                 const __grid_constant__ RopeTable table, int tokens, int units) {
  NOVA_SHARED_MEMORY(MixSums, s);
  const int groups = ceil_div(part.x.heads, kHeads);
  const int block = blockIdx.x / groups, group = blockIdx.x % groups;
  const int u = threadIdx.x % units, j = threadIdx.x / units % kHeads, run = threadIdx.x / units / kHeads;
  const int head = group * kHeads + j, first = first_chunk(u, table), second = second_chunk(u, table);
  float d_before = 0.f, d_now = 0.f;
  if (head < part.x.heads) {
    const float before = __ldg(part.mix_X2 + 2 * head), now = __ldg(part.mix_X2 + 2 * head + 1);
    const __nv_bfloat16* dy = part.dy.data + head * part.dy.head_stride;
    const __nv_bfloat16* x = part.x.data + head * part.x.head_stride;
    __nv_bfloat16* dx = part.dx.data + head * part.dx.head_stride;
    const int first_token = (block * kRuns + run) * kRun, end = min(first_token + kRun, tokens);
    Chunks after;  // dy of the token behind
    if (end < tokens && first_token < end) after = load_unit(dy + end * part.dy.token_stride, first, second);
    for (int t = end - 1; t >= first_token; --t) {
      const Chunks here = load_unit(dy + t * part.dy.token_stride, first, second);
      const Values row = widen(load_unit(x + t * part.x.token_stride, first, second));
      const bool next = t + 1 < tokens && previous_T[t + 1] == t;
      const int from = successors.offset_T1[t], to = successors.offset_T1[t + 1];
      Values d = widen(here), followed{};
      if (part.turns) apply(load_turn(table, position_T[t], u, -1.f), table.interleaved, d);
      if (next) add(followed, after);
      for (int b = from; b < to; ++b)
        add(followed, load_unit(dy + successors.tokens_J[b] * part.dy.token_stride, first, second));
      if (part.turns && (next || from < to))
        apply(load_turn(table, position_T[t] + 1, u, -1.f), table.interleaved, followed);
      d_now += dot(d, row);
      d_before += dot(followed, row);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        d.a[i] = now * d.a[i] + before * followed.a[i];
        d.b[i] = now * d.b[i] + before * followed.b[i];
      }
      store_unit(dx + t * part.dx.token_stride, first, second, d);
      after = here;
    }
  }
  s.sum[0][j][run * units + u] = d_before;
  s.sum[1][j][run * units + u] = d_now;
  __syncthreads();
  if (threadIdx.x < 2 * kHeads && group * kHeads + threadIdx.x / 2 < part.x.heads) {
    const int summed = group * kHeads + threadIdx.x / 2, which = threadIdx.x % 2;
    float total = 0.f;
    for (int i = 0; i < kRuns * units; ++i) total += s.sum[which][threadIdx.x / 2][i];
    part.partial_BX2[(static_cast<int64_t>(block) * part.x.heads + summed) * 2 + which] = total;
  }
}

}  // namespace nova
