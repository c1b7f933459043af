// What a CTA works on and which tiles that means: shared by device code, host code and CPU tests.
//
// Tiles are aligned to the END of their range: tile i of a range that ends at e covers [e - SIZE (i + 1),
// e - SIZE i). So nothing behind a segment is ever multiplied (a NaN in padding cannot reach 0 * NaN), and
// only diagonal tiles and the leftmost one, which hangs over, need a mask. What hangs over are earlier tokens
// of the pack, or below token 0 the zeros of the tensor memory accelerator.
#pragma once
#include <cstdint>

#include "cuda/common/tile_math.h"

namespace nova {

// Sizes of one call. A row of a query tile is (token, head): `1 << pack_shift` query heads of one key head
// stand side by side, so that their keys are loaded once, and a segment's last tile wastes less. Such heads
// are a "pack". Log-sum-exps and deltas are stored as (packs, row_stride) fp32: a pack's rows are contiguous.
struct AttentionShape {
  int tokens, heads, kv_heads, head_dim;
  int pack_shift;
  int row_stride;  // >= tokens << pack_shift, a multiple of 4: rows of 16 bytes, as tensor maps need

  NOVA_HD int packs() const { return heads >> pack_shift; }
  NOVA_HD int packs_per_kv_head() const { return packs() / kv_heads; }
  NOVA_HD int kv_head(int pack) const { return pack / packs_per_kv_head(); }
  // Of row r of a tile whose first token is given.
  NOVA_HD int token(int first, int r) const { return first + (r >> pack_shift); }
  NOVA_HD int head(int pack, int r) const { return (pack << pack_shift) + (r & ((1 << pack_shift) - 1)); }
  NOVA_HD int64_t scalar(int pack, int first, int r) const {
    return static_cast<int64_t>(pack) * row_stride + (static_cast<int64_t>(first) << pack_shift) + r;
  }
};

// Packs hold as many query heads of a key head as a power of two up to 16 divides.
NOVA_HD AttentionShape make_attention_shape(int tokens, int heads, int kv_heads, int head_dim) {
  int shift = 0;
  while (shift < 4 && heads / kv_heads % (2 << shift) == 0) ++shift;
  return {tokens, heads, kv_heads, head_dim, shift, ceil_div(tokens << shift, 4) * 4};
}

// Items of a CTA from a list that is sorted by work: there and back again (of three CTAs: 0 1 2, 5 4 3, 6 7
// 8), so that none gets the longest of every round. At or behind the list's end: no more items.
NOVA_HD int item_of(int round, int cta, int ctas) {
  return round * ctas + (round % 2 ? ctas - 1 - cta : cta);
}

// Rows of the lists that host/attention_tiles.h makes. An item of the forward and dQ kernels is (tile, pack),
// one of the dK/dV kernel (tile, key head); the head is the faster index.
struct QueryTile {
  int q_begin, q_end, own_begin, prefix_begin, prefix_end;
};
struct KeyTile {
  int k_begin, k_end, own_end, branch_begin, branch_end;
};

constexpr int kKeys = 128;  // per tile, in all kernels

// The key tiles that a query tile meets: own tiles from the diagonal leftwards, then those of the prefix.
struct KeyTiles {
  int own, all;
  NOVA_HD explicit KeyTiles(const QueryTile& t)
      : own(ceil_div(t.q_end - t.own_begin, kKeys)),
        all(own + ceil_div(t.prefix_end - t.prefix_begin, kKeys)) {}
  NOVA_HD int first_key(const QueryTile& t, int i) const {
    return i < own ? t.q_end - kKeys * (i + 1) : t.prefix_end - kKeys * (i - own + 1);
  }
  NOVA_HD int lowest_key(const QueryTile& t, int i) const { return i < own ? t.own_begin : t.prefix_begin; }
  // A query must not see keys of tile i that stand behind it.
  NOVA_HD bool diagonal(const QueryTile& t, int i) const {
    return i < own && first_key(t, i) + kKeys - 1 > t.q_begin;
  }
  NOVA_HD bool masked(const QueryTile& t, int i) const {
    return diagonal(t, i) || first_key(t, i) < lowest_key(t, i);
  }
};

// The query tiles that meet a key tile, per pack: those of its own segment, then those of all branches
// behind it, which lie side by side.
struct QueryTiles {
  int tokens, own, all;
  NOVA_HD QueryTiles(const KeyTile& t, int tokens_per_tile)
      : tokens(tokens_per_tile),
        own(ceil_div(t.own_end - t.k_begin, tokens)),
        all(own + ceil_div(t.branch_end - t.branch_begin, tokens)) {}
  NOVA_HD int first_query(const KeyTile& t, int i) const {
    return i < own ? t.own_end - tokens * (i + 1) : t.branch_end - tokens * (i - own + 1);
  }
  // Queries below it are no queries of these keys; own ones see keys up to themselves only.
  NOVA_HD int lowest_query(const KeyTile& t, int i) const { return i < own ? t.k_begin : t.branch_begin; }
  NOVA_HD bool masked(const KeyTile& t, int i) const {
    return i < own ? first_query(t, i) < t.k_end - 1 : first_query(t, i) < t.branch_begin;
  }
};

// A dK/dV item is (tile, key head, part); parts are the faster index. With few tiles and key heads (tensor
// parallelism leaves one per rank) there are too few items for a GPU: the steps of each, its (pack, query
// tile) pairs, are then cut into parts, whose sums are added afterwards in their order. Of the table and the
// heads only, not of the GPU: the same bits everywhere. 512: four items for each of 132 multiprocessors.
NOVA_HD int attention_key_parts(int tiles, int kv_heads) {
  const int wanted = ceil_div(512, tiles * kv_heads);
  return wanted < 16 ? wanted : 16;
}
struct KeySteps {
  int pack, tile, left;  // of the next step; how many are left

  NOVA_HD KeySteps(int first_pack, int packs, int tiles, int part, int parts) {
    const int all = packs * tiles, each = ceil_div(all, parts), begin = part * each;
    pack = first_pack + begin / tiles;
    tile = begin % tiles;
    left = all - begin < each ? all - begin : each;  // <= 0: none
  }
  NOVA_HD void next(int tiles) {
    --left;
    if (++tile == tiles) {
      tile = 0;
      ++pack;
    }
  }
};

}  // namespace nova
