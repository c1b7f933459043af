#include "cuda/packed_attention/launch.h"

#include <algorithm>
#include <cmath>

#include "cuda/common/hang_flag.h"
#include "cuda/common/launch.h"
#include "cuda/common/tensor_map.h"
#include "cuda/packed_attention/kernels.cuh"

namespace nova {
namespace {

constexpr float kLog2e = 1.44269504f;

CUtensorMap map_rows(const Rows& rows, const AttentionShape& shape, int heads, int box_heads,
                     int box_tokens) {
  return make_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, reinterpret_cast<void*>(rows.first),
                  {{shape.head_dim, 2, 64},
                   {heads, 2 * shape.head_dim, box_heads},
                   {shape.tokens, 2 * rows.second, box_tokens}});
}
// `rows` rows of a query tile: packs of heads of as many tokens as fit.
CUtensorMap map_queries(const Rows& q, const AttentionShape& shape, int rows) {
  return map_rows(q, shape, shape.heads, 1 << shape.pack_shift, rows >> shape.pack_shift);
}
CUtensorMap map_keys(const Rows& k, const AttentionShape& shape) {
  return map_rows(k, shape, shape.kv_heads, 1, kKeys);
}
CUtensorMap map_scalars(uintptr_t scalars, const AttentionShape& shape, int rows) {
  return make_map(
      CU_TENSOR_MAP_DATA_TYPE_FLOAT32, reinterpret_cast<void*>(scalars),
      {{shape.tokens << shape.pack_shift, 4, rows}, {shape.packs(), 4 * int64_t{shape.row_stride}, 1}},
      CU_TENSOR_MAP_SWIZZLE_NONE);
}

void require_rows(const Rows& rows, int width, const char* name) {
  require_aligned(rows.first, 16, name);
  require(rows.second >= width && rows.second % 8 == 0,
          std::string(name) + " has " + std::to_string(rows.second) +
              " elements from token to token; they must be a multiple of 8 and at least the " +
              std::to_string(width) + " of a token's heads");
}
void require_tiles(const TileList& tiles, const AttentionShape& shape, const char* name) {
  require_aligned(tiles.first, 4, name);
  require(tiles.second >= 1 && tiles.second <= 0x7fffffff / shape.heads - 65536,
          std::string(name) + " holds " + std::to_string(tiles.second) +
              " tiles; tiles x heads must be positive and an int32");
}
void require_scale(float softmax_scale) {
  require(softmax_scale > 0 && std::isfinite(softmax_scale), "softmax_scale must be positive and finite");
}

struct Grid {
  int items, threads, blocks;
  uintptr_t stream;
};
template <class Kernel, class... Arguments>
void launch(Kernel* kernel, const Grid& grid, int smem, const Arguments&... arguments) {
  allow_shared_memory(kernel, smem);
  const int blocks = std::min(grid.blocks > 0 ? grid.blocks : multiprocessors(), grid.items);
  kernel<<<blocks, grid.threads, smem, reinterpret_cast<cudaStream_t>(grid.stream)>>>(arguments...);
  check(cudaGetLastError(), "packed_attention");
  check_hang_flag("packed_attention");
}

template <int H>
void forward(const AttentionShape& shape, const Rows& q, const Rows& k, const Rows& v, const TileList& tiles,
             uintptr_t out, uintptr_t lse2, float softmax_scale, int blocks, uintptr_t stream) {
  const ForwardArguments a{reinterpret_cast<const QueryTile*>(tiles.first),
                           tiles.second * shape.packs(),
                           shape,
                           reinterpret_cast<__nv_bfloat16*>(out),
                           reinterpret_cast<float*>(lse2),
                           softmax_scale * kLog2e};
  launch(attention_fwd<H>, {a.items, ForwardTile<H>::kThreads, blocks, stream}, kForwardSmemBytes<H>,
         map_queries(q, shape, ForwardTile<H>::kRows), map_keys(k, shape), map_keys(v, shape), a);
}

}  // namespace

AttentionShape attention_shape(int tokens, int heads, int kv_heads, int head_dim) {
  require(tokens >= 1 && tokens <= 1 << 20 && heads >= 1 && heads <= 1024,
          "tokens must be in 1..2^20 and heads in 1..1024");
  require(kv_heads >= 1 && heads % kv_heads == 0, "heads must be a multiple of kv_heads");
  require(head_dim == 64 || head_dim == 128, "head_dim must be 64 or 128");
  return make_attention_shape(tokens, heads, kv_heads, head_dim);
}

int attention_forward_tokens(const AttentionShape& shape) {
  return (shape.head_dim == 128 ? ForwardTile<128>::kRows : ForwardTile<64>::kRows) >> shape.pack_shift;
}
int attention_dq_tokens(const AttentionShape& shape) {
  return (shape.head_dim == 128 ? DqTile<128>::kRows : DqTile<64>::kRows) >> shape.pack_shift;
}

void attention_forward(const AttentionShape& shape, const Rows& q, const Rows& k, const Rows& v,
                       const TileList& query_tiles, uintptr_t out, uintptr_t lse2, float softmax_scale,
                       int blocks, uintptr_t stream) {
  require_rows(q, shape.heads * shape.head_dim, "q");
  require_rows(k, shape.kv_heads * shape.head_dim, "k");
  require_rows(v, shape.kv_heads * shape.head_dim, "v");
  require_tiles(query_tiles, shape, "query_tiles");
  require_aligned(out, 16, "out");
  require_aligned(lse2, 16, "lse2");
  require_scale(softmax_scale);
  const auto run = shape.head_dim == 128 ? forward<128> : forward<64>;
  run(shape, q, k, v, query_tiles, out, lse2, softmax_scale, blocks, stream);
}

namespace {

struct Backward {
  const AttentionShape& shape;
  const Rows &q, &k, &v, &d_out;
  const TileList &query_tiles, &key_tiles;
  uintptr_t out, lse2, delta, dq, dk, dv, partials;
  float softmax_scale;
  int blocks;
  uintptr_t stream;

  template <int H>
  void run() const {
    const int64_t rows = int64_t{shape.tokens} * shape.heads;
    attention_delta<H><<<static_cast<unsigned>((rows + kDeltaRows<H> - 1) / kDeltaRows<H>), kDeltaThreads, 0,
                         reinterpret_cast<cudaStream_t>(stream)>>>(
        reinterpret_cast<const __nv_bfloat16*>(out), reinterpret_cast<const __nv_bfloat16*>(d_out.first),
        d_out.second, reinterpret_cast<float*>(delta), shape);
    check(cudaGetLastError(), "packed_attention, delta");
    const float scale_log2 = softmax_scale * kLog2e;
    const DqArguments for_dq{reinterpret_cast<const QueryTile*>(query_tiles.first),
                             query_tiles.second * shape.packs(),
                             shape,
                             reinterpret_cast<const float*>(lse2),
                             reinterpret_cast<const float*>(delta),
                             reinterpret_cast<__nv_bfloat16*>(dq),
                             softmax_scale,
                             scale_log2};
    launch(attention_bwd_dq<H>, {for_dq.items, DqTile<H>::kThreads, blocks, stream}, kDqSmemBytes<H>,
           map_queries(q, shape, DqTile<H>::kRows), map_queries(d_out, shape, DqTile<H>::kRows),
           map_keys(k, shape), map_keys(v, shape), for_dq);
    constexpr int kQueries = DkvTile<H>::kQueries;
    const DkvMaps maps{map_queries(q, shape, kQueries),
                       map_queries(d_out, shape, kQueries),
                       map_keys(k, shape),
                       map_keys(v, shape),
                       map_scalars(lse2, shape, kQueries),
                       map_scalars(delta, shape, kQueries)};
    const int parts = attention_key_parts(key_tiles.second, shape.kv_heads);
    const int64_t elements = int64_t{shape.tokens} * shape.kv_heads * H;
    const DkvArguments for_dkv{reinterpret_cast<const KeyTile*>(key_tiles.first),
                               key_tiles.second * shape.kv_heads * parts,
                               shape,
                               parts,
                               reinterpret_cast<__nv_bfloat16*>(dk),
                               reinterpret_cast<__nv_bfloat16*>(dv),
                               reinterpret_cast<float*>(partials),
                               reinterpret_cast<float*>(partials) + parts * elements,
                               softmax_scale,
                               scale_log2};
    launch(attention_bwd_dkv<H>, {for_dkv.items, DkvTile<H>::kThreads, blocks, stream}, kDkvSmemBytes<H>,
           maps, for_dkv);
    if (parts > 1) {
      attention_sum_parts<<<static_cast<unsigned>((elements / 4 + kSumThreads - 1) / kSumThreads),
                            kSumThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(for_dkv);
      check(cudaGetLastError(), "packed_attention, partial sums");
    }
  }
};

}  // namespace

void attention_backward(const AttentionShape& shape, const Rows& q, const Rows& k, const Rows& v,
                        const Rows& d_out, const TileList& query_tiles, const TileList& key_tiles,
                        uintptr_t out, const Scalars& lse2_and_delta,
                        const std::tuple<uintptr_t, uintptr_t, uintptr_t>& dq_dk_dv, uintptr_t partials,
                        float softmax_scale, int blocks, uintptr_t stream) {
  const auto [lse2, delta] = lse2_and_delta;
  const auto [dq, dk, dv] = dq_dk_dv;
  require_rows(q, shape.heads * shape.head_dim, "q");
  require_rows(k, shape.kv_heads * shape.head_dim, "k");
  require_rows(v, shape.kv_heads * shape.head_dim, "v");
  require_rows(d_out, shape.heads * shape.head_dim, "d_out");
  require_tiles(query_tiles, shape, "query_tiles");
  require_tiles(key_tiles, shape, "key_tiles");
  require_scale(softmax_scale);
  require_aligned(out, 16, "out");
  require_aligned(lse2, 16, "lse2");
  require_aligned(delta, 16, "delta");
  require_aligned(dq, 16, "dq");
  require_aligned(dk, 16, "dk");
  require_aligned(dv, 16, "dv");
  if (attention_key_parts(key_tiles.second, shape.kv_heads) > 1) require_aligned(partials, 16, "partials");
  const Backward backward{shape, q,  k,  v,  d_out,    query_tiles,   key_tiles, out,   lse2,
                          delta, dq, dk, dv, partials, softmax_scale, blocks,    stream};
  if (shape.head_dim == 128) {
    backward.run<128>();
  } else {
    backward.run<64>();
  }
}

}  // namespace nova
