// The kernels of packed_attention on buffers of the caller, as launch.cu launches them; and their index logic
// on its own.
#include <cstdio>
#include <exception>

extern "C" int nova_mutation;  // the one that is on, in a library whose source has some
int nova_mutation = -1;

#include "cuda/packed_attention/kernels.cuh"

using namespace nova;

namespace {

struct Rows {
  const void* data;
  int64_t stride;  // elements from token to token
};

CUtensorMap map_rows(const Rows& rows, const AttentionShape& shape, int heads, int box_heads,
                     int box_tokens) {
  return {static_cast<const uint8_t*>(rows.data),
          3,
          2,
          128,
          {shape.head_dim, heads, shape.tokens},
          {2, 2 * shape.head_dim, 2 * rows.stride},
          {64, box_heads, box_tokens}};
}
CUtensorMap map_queries(const Rows& rows, const AttentionShape& shape, int tile) {
  return map_rows(rows, shape, shape.heads, 1 << shape.pack_shift, tile >> shape.pack_shift);
}
CUtensorMap map_keys(const Rows& rows, const AttentionShape& shape) {
  return map_rows(rows, shape, shape.kv_heads, 1, kKeys);
}
CUtensorMap map_scalars(const float* scalars, const AttentionShape& shape, int rows) {
  return {reinterpret_cast<const uint8_t*>(scalars),
          2,
          4,
          0,
          {shape.tokens << shape.pack_shift, shape.packs()},
          {4, 4 * int64_t{shape.row_stride}},
          {rows, 1}};
}

template <class Work>
void reported(char* message, int size, const Work& work) {
  message[0] = 0;
  try {
    work();
  } catch (const std::exception& error) {
    std::snprintf(message, size, "%s", error.what());
  }
}

}  // namespace

extern "C" {

struct Call {
  AttentionShape shape;
  int grid;
  unsigned seed;
  float scale, scale_log2;
  const QueryTile* query_tiles;
  const KeyTile* key_tiles;
  int num_query_tiles, num_key_tiles;
  Rows q, k, v, d_out;
  __nv_bfloat16 *out, *dq, *dk, *dv;
  float *lse2, *delta, *partials;
  int parts;
};

void attention_shape(int tokens, int heads, int kv_heads, int head_dim, AttentionShape* shape) {
  *shape = make_attention_shape(tokens, heads, kv_heads, head_dim);
}
int attention_forward_tokens(const AttentionShape* shape) {
  return (shape->head_dim == 128 ? ForwardTile<128>::kRows : ForwardTile<64>::kRows) >> shape->pack_shift;
}
int attention_dq_tokens(const AttentionShape* shape) {
  return (shape->head_dim == 128 ? DqTile<128>::kRows : DqTile<64>::kRows) >> shape->pack_shift;
}
int attention_key_tokens() { return kKeys; }

}  // extern "C"

namespace {

template <int H>
void forward(const Call& c) {
  const ForwardArguments a{c.query_tiles, c.num_query_tiles * c.shape.packs(), c.shape, c.out, c.lse2,
                           c.scale_log2};
  const CUtensorMap q = map_queries(c.q, c.shape, ForwardTile<H>::kRows), k = map_keys(c.k, c.shape),
                    v = map_keys(c.v, c.shape);
  emulator::launch(std::min(c.grid, a.items), 1, ForwardTile<H>::kThreads, c.seed,
                   [&] { attention_fwd<H>(q, k, v, a); });
}

template <int H>
void backward(const Call& c) {
  const int64_t rows = int64_t{c.shape.tokens} * c.shape.heads;
  emulator::launch(static_cast<int>((rows + kDeltaRows<H> - 1) / kDeltaRows<H>), 1, kDeltaThreads, c.seed,
                   [&] {
                     attention_delta<H>(c.out, static_cast<const __nv_bfloat16*>(c.d_out.data),
                                        c.d_out.stride, c.delta, c.shape);
                   });
  const DqArguments for_dq{
      c.query_tiles, c.num_query_tiles * c.shape.packs(), c.shape, c.lse2, c.delta, c.dq, c.scale,
      c.scale_log2};
  const CUtensorMap q = map_queries(c.q, c.shape, DqTile<H>::kRows),
                    d_out = map_queries(c.d_out, c.shape, DqTile<H>::kRows), k = map_keys(c.k, c.shape),
                    v = map_keys(c.v, c.shape);
  emulator::launch(std::min(c.grid, for_dq.items), 1, DqTile<H>::kThreads, c.seed,
                   [&] { attention_bwd_dq<H>(q, d_out, k, v, for_dq); });
  constexpr int kQueries = DkvTile<H>::kQueries;
  const DkvMaps maps{map_queries(c.q, c.shape, kQueries),
                     map_queries(c.d_out, c.shape, kQueries),
                     map_keys(c.k, c.shape),
                     map_keys(c.v, c.shape),
                     map_scalars(c.lse2, c.shape, kQueries),
                     map_scalars(c.delta, c.shape, kQueries)};
  const int64_t elements = int64_t{c.shape.tokens} * c.shape.kv_heads * H;
  const DkvArguments for_dkv{c.key_tiles, c.num_key_tiles * c.shape.kv_heads * c.parts,
                             c.shape,     c.parts,
                             c.dk,        c.dv,
                             c.partials,  c.partials + c.parts * elements,
                             c.scale,     c.scale_log2};
  emulator::launch(std::min(c.grid, for_dkv.items), 1, DkvTile<H>::kThreads, c.seed,
                   [&] { attention_bwd_dkv<H>(maps, for_dkv); });
  if (c.parts > 1)
    emulator::launch(static_cast<int>((elements / 4 + kSumThreads - 1) / kSumThreads), 1, kSumThreads, c.seed,
                     [&] { attention_sum_parts(for_dkv); });
}

// How often each pair (query, key) of a pack is computed; an error where a product would meet a row behind
// its range, which may hold anything.
void count_pairs(const Call& c, int query_rows, uint8_t* by_query, uint8_t* by_key) {
  const int tokens = c.shape.tokens;
  const auto count = [tokens](uint8_t* pairs, int q, int k) {
    if (q < 0 || k < 0 || q >= tokens || k >= tokens) emulator::fail("query %d and key %d", q, k);
    ++pairs[static_cast<int64_t>(q) * tokens + k];
  };
  for (int i = 0; i < c.num_query_tiles; ++i) {
    const QueryTile t = c.query_tiles[i];
    const KeyTiles tiles(t);
    for (int n = 0; n < tiles.all; ++n) {
      const int first = tiles.first_key(t, n), lowest = tiles.lowest_key(t, n);
      if (first + kKeys > (n < tiles.own ? t.q_end : t.prefix_end)) emulator::fail("keys behind their range");
      for (int q = t.q_begin; q < t.q_end; ++q)
        for (int k = first; k < first + kKeys; ++k)
          if (!tiles.masked(t, n) || (k >= lowest && (!tiles.diagonal(t, n) || k <= q)))
            count(by_query, q, k);
    }
  }
  for (int i = 0; i < c.num_key_tiles; ++i) {
    const KeyTile t = c.key_tiles[i];
    const QueryTiles tiles(t, query_rows >> c.shape.pack_shift);
    for (int n = 0; n < tiles.all; ++n) {
      const int first = tiles.first_query(t, n), lowest = tiles.lowest_query(t, n);
      if (first + tiles.tokens > (n < tiles.own ? t.own_end : t.branch_end))
        emulator::fail("queries behind their range");
      for (int q = first; q < first + tiles.tokens; ++q)
        for (int k = t.k_begin; k < t.k_end; ++k)
          if (!tiles.masked(t, n) || (q >= lowest && (n >= tiles.own || q >= k))) count(by_key, q, k);
    }
  }
}

}  // namespace

extern "C" {

void emulate_forward(const Call* call, char* message, int size) {
  reported(message, size, [&] { call->shape.head_dim == 128 ? forward<128>(*call) : forward<64>(*call); });
}
void emulate_backward(const Call* call, char* message, int size) {
  reported(message, size, [&] { call->shape.head_dim == 128 ? backward<128>(*call) : backward<64>(*call); });
}
void count_attention_pairs(const Call* call, int query_rows, uint8_t* by_query, uint8_t* by_key,
                           char* message, int size) {
  reported(message, size, [&] { count_pairs(*call, query_rows, by_query, by_key); });
}
// The items of one CTA, in order; returns how many.
int attention_items(int cta, int ctas, int items, int* out) {
  int count = 0;
  for (int round = 0, item; (item = item_of(round, cta, ctas)) < items; ++round) out[count++] = item;
  return count;
}

}  // extern "C"
