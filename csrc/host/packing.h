// Which documents share a pack, and which data-parallel rank takes which pack. Host code, no dependencies.
#pragma once

#include <cstdint>
#include <vector>

namespace nova {

// Pack p holds documents order[offsets[p]] .. order[offsets[p + 1] - 1].
struct PackPlan {
  std::vector<int32_t> order;
  std::vector<int64_t> offsets;
};

// Largest capacity accepted: memory and time have a term linear in it.
constexpr int64_t kMaxCapacity = int64_t{1} << 24;

// Best-fit decreasing. Documents are placed longest first, equal lengths in input order, each into the
// open pack that it leaves fullest; among packs with the same space left, the one changed last.
// Documents of at most in_order_up_to tokens come last, in input order instead of by length: sorted, the
// short ones would fill whole packs with their like, and such packs make poor training batches.
// O(n log_64 capacity + capacity) time, 12 n + O(packs + capacity) bytes.
// Throws std::invalid_argument for a length outside 1..capacity or a capacity outside 1..kMaxCapacity.
PackPlan pack_best_fit_decreasing(const int32_t* lengths, int64_t num_documents, int64_t capacity,
                                  int64_t in_order_up_to = 0);

// The same packs with other documents of the same lengths, and in another order: pack i of the result has the
// lengths of pack packs[i] of the plan, and documents of one length take the places for that length in the
// order in which `documents` names them. documents and packs are permutations; documents and plan.order hold
// num_documents elements. O(n) time, 8 n + O(packs + longest) bytes. Throws std::invalid_argument for what is
// no permutation, or a negative length.
struct PlanView {
  const int32_t* order;
  const int64_t* offsets;
  int64_t num_packs;
};
PackPlan redraw_packs(const int32_t* lengths, int64_t num_documents, const PlanView& plan,
                      const int32_t* documents, const int64_t* packs);

// Splits num_packs packs over ranks, num_packs / ranks each, with sums of work as equal as a greedy start
// (heaviest first, to the lightest rank with a free place) and pairwise swaps make them.
// Row r of the result holds rank r's packs in ascending order.
// Throws std::invalid_argument when ranks does not divide num_packs, or work is negative or not finite.
std::vector<int32_t> balance_packs(const double* work, int64_t num_packs, int64_t ranks);

}  // namespace nova
