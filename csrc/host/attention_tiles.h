// The tiles that packed attention computes: queries of one segment, or keys that the same queries see.
#pragma once

#include <cstdint>
#include <vector>

namespace nova {

// Both lists hold kTileFields numbers per tile, most work first, equals in pack order.
//   queries   q_begin, q_end, segment_begin, prefix_begin, prefix_end    of its prefix; empty for a trunk
//   keys      k_begin, k_end, segment_end, branch_begin, branch_end      of all branches that see the keys,
//   else 0, 0
// A query tile never leaves its segment. A trunk's key tiles are cut where its prefix ends, so that the
// branches behind it see all keys of a tile or none.
constexpr int kTileFields = 5;
struct AttentionTiles {
  std::vector<int32_t> queries;
  std::vector<int32_t> keys;
};

// segments: rows start, end, prefix_start, prefix_end of a valid table
// (nova_kernels.segments.validate_segments). O(segments + tiles + tokens / min(query_tokens, key_tokens)).
AttentionTiles attention_tiles(const int32_t* segments, int64_t num_segments, int32_t query_tokens,
                               int32_t key_tokens);

}  // namespace nova
