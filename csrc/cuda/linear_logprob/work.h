// Which tiles a cluster works on: shared by device code, host code and CPU tests.
#pragma once
#include <cstdint>

#include "cuda/common/tile_math.h"

namespace nova {

// One cluster walks vocabulary tiles [v_begin, v_end) of one pair of row tiles, for each of its row pairs.
struct LogprobWork {
  int row_pairs, splits, v_tiles;  // work item i: row pair i % row_pairs, split i / row_pairs
  NOVA_HD int count() const { return row_pairs * splits; }
  NOVA_HD void at(int item, int& pair, int& split, int& v_begin, int& v_end) const {
    pair = item % row_pairs;
    split = item / row_pairs;
    v_begin = static_cast<int>(static_cast<int64_t>(v_tiles) * split / splits);
    v_end = static_cast<int>(static_cast<int64_t>(v_tiles) * (split + 1) / splits);
  }
};

}  // namespace nova
