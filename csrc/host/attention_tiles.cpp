#include "host/attention_tiles.h"

#include <algorithm>
#include <stdexcept>

namespace nova {
namespace {

struct Segment {
  int32_t start, end, prefix_start, prefix_end;
  bool is_branch() const { return prefix_end > prefix_start; }
};

struct Tile {
  int32_t fields[kTileFields];
  int32_t work;  // tokens it meets
};

// Stable, most work first; work in units of `unit` tokens, which is what the kernels loop over.
std::vector<int32_t> heaviest_first(const std::vector<Tile>& tiles, int32_t unit) {
  int32_t most = 0;
  for (const Tile& tile : tiles) most = std::max(most, tile.work / unit);
  std::vector<int64_t> place(static_cast<size_t>(most) + 2, 0);  // place[i]: first of the i-th heaviest kind
  for (const Tile& tile : tiles) ++place[most - tile.work / unit + 1];
  for (size_t i = 1; i < place.size(); ++i) place[i] += place[i - 1];
  std::vector<int32_t> sorted(tiles.size() * kTileFields);
  for (const Tile& tile : tiles) {
    const int64_t at = place[most - tile.work / unit]++;
    std::copy(tile.fields, tile.fields + kTileFields, sorted.begin() + at * kTileFields);
  }
  return sorted;
}

}  // namespace

AttentionTiles attention_tiles(const int32_t* segments, int64_t num_segments, int32_t query_tokens,
                               int32_t key_tokens) {
  if (query_tokens < 1 || key_tokens < 1) {
    throw std::invalid_argument("query_tokens and key_tokens are the sizes of tiles: they must be 1 or more");
  }
  const auto* table = reinterpret_cast<const Segment*>(segments);
  std::vector<Tile> queries, keys;
  for (int64_t s = 0; s < num_segments; ++s) {
    const Segment& own = table[s];
    const int32_t prefix = own.prefix_end - own.prefix_start;
    for (int32_t q = own.start; q < own.end; q += query_tokens) {
      const int32_t end = std::min(q + query_tokens, own.end);
      queries.push_back({{q, end, own.start, own.prefix_start, own.prefix_end}, end - own.start + prefix});
    }
    // A trunk learns from the branches behind it where its prefix ends, and which queries see it.
    int32_t prefix_end = own.start, branch_begin = 0, branch_end = 0;
    if (!own.is_branch()) {
      for (int64_t b = s + 1; b < num_segments && table[b].is_branch(); ++b) {
        if (branch_end == 0) branch_begin = table[b].start;
        prefix_end = table[b].prefix_end;
        branch_end = table[b].end;
      }
    }
    for (int32_t k = own.start; k < own.end;) {
      const bool shared = k < prefix_end;
      const int32_t end = std::min(k + key_tokens, shared ? prefix_end : own.end);
      const int32_t from = shared ? branch_begin : 0, to = shared ? branch_end : 0;
      keys.push_back({{k, end, own.end, from, to}, own.end - k + to - from});
      k = end;
    }
  }
  const int32_t unit = std::min(query_tokens, key_tokens);
  return {heaviest_first(queries, unit), heaviest_first(keys, unit)};
}

}  // namespace nova
