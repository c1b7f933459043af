// Which tiles a cluster works on: shared by device code, host code and CPU tests.
#pragma once
#include <cstdint>

#include "cuda/common/tile_math.h"

namespace nova {

constexpr int kM = 128, kN = 256, kK = 64;  // a tile: rows, columns of the vocabulary, depth of a step

// One cluster walks column tiles [v_begin, v_end) of one pair of row tiles, one row tile per CTA.
struct LogprobItem {
  int pair, split, v_begin, v_end;
};

// Pairs of row tiles times ranges of the vocabulary. All clusters of a range walk it in the same order at the
// same time, so the weight comes from memory once per group of pairs. Nothing depends on how many clusters
// there are.
struct LogprobWork {
  TileOrder order;  // tiles_m: pairs, tiles_n: ranges, group: pairs whose rows stay in L2 together
  int v_tiles;      // times the ranges an int32: a 64-bit division costs the producer its registers
  NOVA_HD int count() const { return order.count(); }
  NOVA_HD LogprobItem at(int number) const {
    LogprobItem item;
    order.at(number, item.pair, item.split);
    item.v_begin = v_tiles * item.split / order.tiles_n;
    item.v_end = v_tiles * (item.split + 1) / order.tiles_n;
    return item;
  }
};

NOVA_HD LogprobWork logprob_work(int rows, int v_tiles, int splits, int group) {
  return {{ceil_div(ceil_div(rows, kM), 2), splits, group}, v_tiles};
}

}  // namespace nova
