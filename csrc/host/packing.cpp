#include "host/packing.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <string>
#include <utility>

namespace nova {
namespace {

// A set of integers in 0..size-1 as a tree of 64-bit words: bit i of a level says that word i of the level
// below is not zero. Finding the next member touches at most two words per level (two levels for 4096).
class BitmapSet {
 public:
  explicit BitmapSet(int64_t size) {
    do {
      size = (size + 63) / 64;
      levels_.emplace_back(static_cast<size_t>(size), uint64_t{0});
    } while (size > 1);
  }

  void insert(int64_t i) {
    for (auto& level : levels_) {
      uint64_t& word = level[i >> 6];
      const bool was_empty = word == 0;
      word |= uint64_t{1} << (i & 63);
      if (!was_empty) return;
      i >>= 6;
    }
  }

  void erase(int64_t i) {
    for (auto& level : levels_) {
      uint64_t& word = level[i >> 6];
      word &= ~(uint64_t{1} << (i & 63));
      if (word != 0) return;
      i >>= 6;
    }
  }

  // Smallest member >= i, or -1.
  int64_t lower_bound(int64_t i) const {
    for (size_t up = 0; up < levels_.size(); ++up) {
      const auto& level = levels_[up];
      if ((i >> 6) >= static_cast<int64_t>(level.size())) return -1;
      const uint64_t word = level[i >> 6] & (~uint64_t{0} << (i & 63));
      if (word != 0) {
        i = (i & ~int64_t{63}) | __builtin_ctzll(word);
        while (up-- > 0) i = (i << 6) | __builtin_ctzll(levels_[up][i]);
        return i;
      }
      i = (i >> 6) + 1;  // nothing left in this word: look for the next one that is not zero
    }
    return -1;
  }

 private:
  std::vector<std::vector<uint64_t>> levels_;
};

// Packs with free space, grouped by how much: one stack per amount, linked through next_.
class OpenPacks {
 public:
  explicit OpenPacks(int64_t capacity)
      : capacity_(capacity), top_(static_cast<size_t>(capacity) + 1, kNone), free_(capacity + 1) {}

  // Takes the best pack for a document of this length, or a new one, and puts as many of `count` such
  // documents into it as fit: a pack that got one and still has room is the best for the next as well.
  struct Placement {
    uint32_t pack;
    int64_t taken;
  };
  Placement place(int64_t length, int64_t count) {
    int64_t space = free_.lower_bound(length);
    uint32_t pack;
    if (space < 0) {
      pack = static_cast<uint32_t>(next_.size());
      next_.push_back(kNone);
      space = capacity_;
    } else {
      pack = top_[space];
      top_[space] = next_[pack];
      if (top_[space] == kNone) free_.erase(space);
    }
    const int64_t taken = space < 2 * length ? 1 : std::min(count, space / length);
    const int64_t left = space - taken * length;
    if (left > 0) {
      if (top_[left] == kNone) free_.insert(left);
      next_[pack] = top_[left];
      top_[left] = pack;
    }
    return {pack, taken};
  }

  size_t num_packs() const { return next_.size(); }

 private:
  static constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();
  int64_t capacity_;
  std::vector<uint32_t> top_;   // by free space
  std::vector<uint32_t> next_;  // by pack
  BitmapSet free_;
};

void check_packing(const int32_t* lengths, int64_t num_documents, int64_t capacity) {
  if (capacity < 1 || capacity > kMaxCapacity) {
    throw std::invalid_argument("capacity is " + std::to_string(capacity) + " tokens; it must be in 1.." +
                                std::to_string(kMaxCapacity));
  }
  if (num_documents > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument(std::to_string(num_documents) +
                                " documents; at most 2^31 - 1 can be packed at once");
  }
  for (int64_t i = 0; i < num_documents; ++i) {
    if (lengths[i] < 1 || lengths[i] > capacity) {
      throw std::invalid_argument("lengths[" + std::to_string(i) + "] is " + std::to_string(lengths[i]) +
                                  "; a document has 1.." + std::to_string(capacity) +
                                  " tokens (the capacity): drop empty documents, truncate long ones");
    }
  }
}

// Document indices, longest first, equal lengths in input order; length l ends before place ends[l].
struct Sorted {
  std::vector<uint32_t> documents;
  std::vector<uint32_t> ends;
};

Sorted sort_by_decreasing_length(const int32_t* lengths, int64_t num_documents, int64_t capacity) {
  std::vector<uint32_t> cursor(static_cast<size_t>(capacity) + 1, 0);
  for (int64_t i = 0; i < num_documents; ++i) ++cursor[lengths[i]];
  uint32_t begin = 0;
  for (int64_t length = capacity; length > 0; --length) {
    begin += std::exchange(cursor[length], begin);
  }
  std::vector<uint32_t> documents(static_cast<size_t>(num_documents));
  for (int64_t i = 0; i < num_documents; ++i) {
    documents[cursor[lengths[i]]++] = static_cast<uint32_t>(i);
  }
  return {std::move(documents), std::move(cursor)};
}

template <typename T>
void check_permutation(const T* values, int64_t size, const char* name) {
  std::vector<bool> seen(static_cast<size_t>(size), false);
  for (int64_t i = 0; i < size; ++i) {
    if (values[i] < 0 || values[i] >= size || seen[values[i]]) {
      throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) + "] is " +
                                  std::to_string(values[i]) + "; it must be a permutation of 0.." +
                                  std::to_string(size - 1));
    }
    seen[values[i]] = true;
  }
}

// Where documents of length l begin when they are sorted by length.
std::vector<int64_t> begin_of_each_length(const int32_t* lengths, int64_t num_documents) {
  if (num_documents == 0) return {};
  const auto [shortest, longest] = std::minmax_element(lengths, lengths + num_documents);
  if (*shortest < 0 || *longest > kMaxCapacity) {
    throw std::invalid_argument("lengths go from " + std::to_string(*shortest) + " to " +
                                std::to_string(*longest) + "; they must be in 0.." +
                                std::to_string(kMaxCapacity));
  }
  std::vector<int64_t> begins(static_cast<size_t>(*longest) + 1, 0);
  for (int64_t i = 0; i < num_documents; ++i) ++begins[lengths[i]];
  int64_t begin = 0;
  for (int64_t& count : begins) begin += std::exchange(count, begin);
  return begins;
}

using Rank = std::vector<int32_t>;  // pack indices, heaviest first

// The pair (place in heavy, place in light) whose exchange brings the two sums closest; first is -1 when
// no exchange does. Both lists descend in work, so one sweep over each is enough.
std::pair<int64_t, int64_t> best_swap(const Rank& heavy, const Rank& light, const double* work, double gap) {
  std::pair<int64_t, int64_t> best{-1, -1};
  double best_miss = gap / 2 * (1 - 1e-9);  // an exchange must gain more than rounding
  size_t j = 0;
  for (size_t i = 0; i < heavy.size(); ++i) {
    const auto miss = [&](size_t k) { return std::abs(work[heavy[i]] - work[light[k]] - gap / 2); };
    while (j + 1 < light.size() && miss(j + 1) <= miss(j)) ++j;
    if (miss(j) < best_miss) {
      best_miss = miss(j);
      best = {static_cast<int64_t>(i), static_cast<int64_t>(j)};
    }
  }
  return best;
}

std::vector<double> sums_of(const std::vector<Rank>& ranks, const double* work) {
  std::vector<double> sums;
  for (const Rank& packs : ranks) {
    sums.push_back(std::accumulate(packs.begin(), packs.end(), 0.0,
                                   [&](double sum, int32_t pack) { return sum + work[pack]; }));
  }
  return sums;
}

// Lightens the heaviest rank by one exchange with the lightest rank that allows one; false when none does.
bool relieve_heaviest(std::vector<Rank>& ranks, const double* work) {
  const std::vector<double> sums = sums_of(ranks, work);
  std::vector<size_t> lightest_first(ranks.size());
  std::iota(lightest_first.begin(), lightest_first.end(), size_t{0});
  std::stable_sort(lightest_first.begin(), lightest_first.end(),
                   [&](size_t a, size_t b) { return sums[a] < sums[b]; });
  const size_t heavy = lightest_first.back();
  const auto heavier = [&](int32_t a, int32_t b) {
    return work[a] > work[b] || (work[a] == work[b] && a < b);
  };
  for (const size_t light : lightest_first) {
    if (light == heavy) continue;
    const auto [i, j] = best_swap(ranks[heavy], ranks[light], work, sums[heavy] - sums[light]);
    if (i < 0) continue;
    std::swap(ranks[heavy][i], ranks[light][j]);
    std::sort(ranks[heavy].begin(), ranks[heavy].end(), heavier);
    std::sort(ranks[light].begin(), ranks[light].end(), heavier);
    return true;
  }
  return false;
}

// Heaviest pack first, always to the lightest rank that has a place left (the lower rank among equals).
std::vector<Rank> assign_greedily(const double* work, int64_t num_packs, int64_t num_ranks) {
  std::vector<int32_t> heaviest_first(static_cast<size_t>(num_packs));
  std::iota(heaviest_first.begin(), heaviest_first.end(), 0);
  std::stable_sort(heaviest_first.begin(), heaviest_first.end(),
                   [&](int32_t a, int32_t b) { return work[a] > work[b]; });
  using Entry = std::pair<double, int64_t>;  // sum, rank
  std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> lightest;
  for (int64_t r = 0; r < num_ranks; ++r) lightest.emplace(0.0, r);
  std::vector<Rank> ranks(static_cast<size_t>(num_ranks));
  for (const int32_t pack : heaviest_first) {
    const auto [sum, r] = lightest.top();
    lightest.pop();
    ranks[r].push_back(pack);
    if (static_cast<int64_t>(ranks[r].size()) < num_packs / num_ranks) {
      lightest.emplace(sum + work[pack], r);
    }
  }
  return ranks;
}

void check_balance(const double* work, int64_t num_packs, int64_t ranks) {
  if (ranks < 1 || num_packs % ranks != 0) {
    throw std::invalid_argument("ranks is " + std::to_string(ranks) + " for " + std::to_string(num_packs) +
                                " packs; it must be positive and divide the number of packs");
  }
  if (num_packs > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument(std::to_string(num_packs) +
                                " packs; at most 2^31 - 1 can be balanced at once");
  }
  for (int64_t i = 0; i < num_packs; ++i) {
    if (!std::isfinite(work[i]) || work[i] < 0) {
      throw std::invalid_argument("work[" + std::to_string(i) + "] is " + std::to_string(work[i]) +
                                  "; work must be finite and at least 0");
    }
  }
}

}  // namespace

PackPlan pack_best_fit_decreasing(const int32_t* lengths, int64_t num_documents, int64_t capacity,
                                  int64_t in_order_up_to) {
  check_packing(lengths, num_documents, capacity);
  auto [documents, ends] = sort_by_decreasing_length(lengths, num_documents, capacity);

  OpenPacks open(capacity);
  std::vector<uint32_t> pack_of(documents.size());  // by place in `documents`
  int64_t placed = 0;
  for (int64_t length = capacity; length > in_order_up_to; --length) {
    while (placed < ends[length]) {
      const auto [pack, taken] = open.place(length, ends[length] - placed);
      std::fill_n(pack_of.begin() + placed, taken, pack);
      placed += taken;
    }
  }
  for (int64_t i = 0; i < num_documents && placed < num_documents; ++i) {
    if (lengths[i] > in_order_up_to) continue;
    documents[placed] = static_cast<uint32_t>(i);
    pack_of[placed++] = open.place(lengths[i], 1).pack;
  }

  PackPlan plan;
  plan.offsets.assign(open.num_packs() + 1, 0);
  for (const uint32_t pack : pack_of) ++plan.offsets[pack + 1];
  std::partial_sum(plan.offsets.begin(), plan.offsets.end(), plan.offsets.begin());
  std::vector<int64_t> cursor(plan.offsets.begin(), plan.offsets.end() - 1);
  plan.order.resize(documents.size());
  for (size_t i = 0; i < documents.size(); ++i) {
    plan.order[cursor[pack_of[i]]++] = static_cast<int32_t>(documents[i]);
  }
  return plan;
}

PackPlan redraw_packs(const int32_t* lengths, int64_t num_documents, const PlanView& plan,
                      const int32_t* documents, const int64_t* packs) {
  check_permutation(plan.order, num_documents, "order");
  check_permutation(documents, num_documents, "documents");
  check_permutation(packs, plan.num_packs, "packs");
  if (plan.offsets[0] != 0 || plan.offsets[plan.num_packs] != num_documents ||
      !std::is_sorted(plan.offsets, plan.offsets + plan.num_packs + 1)) {
    throw std::invalid_argument("offsets must ascend from 0 to the number of documents");
  }
  std::vector<int64_t> begins = begin_of_each_length(lengths, num_documents);  // of its places in by_length
  std::vector<int64_t> cursor = begins;
  std::vector<int32_t> by_length(static_cast<size_t>(num_documents));
  for (int64_t i = 0; i < num_documents; ++i) by_length[cursor[lengths[documents[i]]]++] = documents[i];

  PackPlan redrawn;
  redrawn.offsets.assign(1, 0);
  std::vector<int64_t> moved_to(static_cast<size_t>(plan.num_packs));  // by old pack: where it begins now
  for (int64_t i = 0; i < plan.num_packs; ++i) {
    const int64_t pack = packs[i];
    moved_to[pack] = redrawn.offsets.back();
    redrawn.offsets.push_back(moved_to[pack] + plan.offsets[pack + 1] - plan.offsets[pack]);
  }
  redrawn.order.resize(by_length.size());
  for (int64_t pack = 0; pack < plan.num_packs; ++pack) {
    int64_t to = moved_to[pack];
    for (int64_t i = plan.offsets[pack]; i < plan.offsets[pack + 1]; ++i) {
      redrawn.order[to++] = by_length[begins[lengths[plan.order[i]]]++];
    }
  }
  return redrawn;
}

std::vector<int32_t> balance_packs(const double* work, int64_t num_packs, int64_t ranks) {
  check_balance(work, num_packs, ranks);
  std::vector<Rank> assigned = assign_greedily(work, num_packs, ranks);
  // Every exchange lowers the sum of squares, so this ends by itself; the bound keeps it O(n^2).
  for (int64_t i = 0; i < num_packs && relieve_heaviest(assigned, work); ++i) {
  }
  std::vector<int32_t> packs;
  packs.reserve(static_cast<size_t>(num_packs));
  for (Rank& rank : assigned) {
    std::sort(rank.begin(), rank.end());
    packs.insert(packs.end(), rank.begin(), rank.end());
  }
  return packs;
}

}  // namespace nova
