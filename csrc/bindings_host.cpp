// nova_kernels._C: host code over numpy buffers. Every exported function is on this screen.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "host/attention_tiles.h"
#include "host/packing.h"

namespace py = pybind11;

namespace {

// Hands a vector's memory to numpy without a copy.
template <typename T>
py::array_t<T> to_numpy(std::vector<T>&& values, const std::vector<py::ssize_t>& shape) {
  auto* owned = new std::vector<T>(std::move(values));
  py::capsule owner(owned, [](void* pointer) { delete static_cast<std::vector<T>*>(pointer); });
  return py::array_t<T>(shape, owned->data(), owner);
}

// One dimension of exactly T: a silent cast could change a value.
template <typename T>
py::array_t<T, py::array::c_style> vector_of(const py::array& array, const char* name) {
  if (array.ndim() != 1 || !py::dtype::of<T>().is(array.dtype())) {
    throw py::value_error(std::string(name) + " is " + std::string(py::str(array.dtype())) + " with " +
                          std::to_string(array.ndim()) +
                          " dimensions; it must be a one-dimensional numpy array of " +
                          std::string(py::str(py::dtype::of<T>())) + ": convert with astype");
  }
  return array;
}

py::tuple pack_best_fit_decreasing(const py::array& lengths, int64_t capacity, int64_t in_order_up_to) {
  const auto values = vector_of<int32_t>(lengths, "lengths");
  const int32_t* data = values.data();
  const py::ssize_t num_documents = values.size();
  nova::PackPlan plan;
  {
    py::gil_scoped_release release;
    plan = nova::pack_best_fit_decreasing(data, num_documents, capacity, in_order_up_to);
  }
  const auto num_offsets = static_cast<py::ssize_t>(plan.offsets.size());
  return py::make_tuple(to_numpy(std::move(plan.order), {num_documents}),
                        to_numpy(std::move(plan.offsets), {num_offsets}));
}

py::tuple redraw_packs(const py::array& lengths, const py::array& order, const py::array& offsets,
                       const py::array& documents, const py::array& packs) {
  const auto lengths_n = vector_of<int32_t>(lengths, "lengths");
  const auto order_n = vector_of<int32_t>(order, "order");
  const auto offsets_p = vector_of<int64_t>(offsets, "offsets");
  const auto documents_n = vector_of<int32_t>(documents, "documents");
  const auto packs_p = vector_of<int64_t>(packs, "packs");
  const py::ssize_t num_documents = lengths_n.size(), num_packs = packs_p.size();
  if (order_n.size() != num_documents || documents_n.size() != num_documents ||
      offsets_p.size() != num_packs + 1) {
    throw py::value_error(
        "lengths, order and documents must be equally long, offsets longer than packs by one");
  }
  const nova::PlanView plan{order_n.data(), offsets_p.data(), num_packs};
  const int32_t* lengths_data = lengths_n.data();
  const int32_t* documents_data = documents_n.data();
  const int64_t* packs_data = packs_p.data();
  nova::PackPlan redrawn;
  {
    py::gil_scoped_release release;
    redrawn = nova::redraw_packs(lengths_data, num_documents, plan, documents_data, packs_data);
  }
  return py::make_tuple(to_numpy(std::move(redrawn.order), {num_documents}),
                        to_numpy(std::move(redrawn.offsets), {num_packs + 1}));
}

py::array_t<int32_t> balance_packs(const py::array& work, int64_t ranks) {
  const auto values = vector_of<double>(work, "work");
  const double* data = values.data();
  const py::ssize_t num_packs = values.size();
  std::vector<int32_t> packs;
  {
    py::gil_scoped_release release;
    packs = nova::balance_packs(data, num_packs, ranks);
  }
  return to_numpy(std::move(packs), {static_cast<py::ssize_t>(ranks), num_packs / ranks});
}

py::tuple attention_tiles(const py::array& segments, int32_t query_tokens, int32_t key_tokens) {
  const bool is_table =
      segments.ndim() == 2 && segments.shape(1) == 4 && py::dtype::of<int32_t>().is(segments.dtype());
  if (!is_table) throw py::value_error("segments must be a numpy array (S, 4) of int32");
  const py::array_t<int32_t, py::array::c_style> table = segments;
  const int32_t* data = table.data();
  const py::ssize_t num_segments = table.shape(0);
  nova::AttentionTiles tiles;
  {
    py::gil_scoped_release release;
    tiles = nova::attention_tiles(data, num_segments, query_tokens, key_tokens);
  }
  const auto rows = [](const std::vector<int32_t>& fields) {
    return static_cast<py::ssize_t>(fields.size() / nova::kTileFields);
  };
  const py::ssize_t num_queries = rows(tiles.queries), num_keys = rows(tiles.keys);
  return py::make_tuple(to_numpy(std::move(tiles.queries), {num_queries, nova::kTileFields}),
                        to_numpy(std::move(tiles.keys), {num_keys, nova::kTileFields}));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host code of nova_kernels: sequence packing.";

  m.def("pack_best_fit_decreasing", &pack_best_fit_decreasing, py::arg("lengths"), py::arg("capacity"),
        py::arg("in_order_up_to") = 0,
        R"(Packs documents into as few packs of `capacity` tokens as best-fit decreasing finds.

Documents are placed longest first, equal lengths in input order, each into the pack that it leaves
fullest (among equals the one changed last). Deterministic; runs without the GIL.

Args:     lengths (n,) int32, tokens per document, each in 1..capacity.   capacity: tokens per pack.
          in_order_up_to: documents of at most so many tokens come last, in input order instead of by length.
Returns:  order (n,) int32, document indices grouped by pack; offsets (num_packs + 1,) int64: pack p holds
          order[offsets[p]:offsets[p + 1]], in the order of placement.
Raises:   ValueError for a length outside 1..capacity (index and value in the message).)");

  m.def("redraw_packs", &redraw_packs, py::arg("lengths"), py::arg("order"), py::arg("offsets"),
        py::arg("documents"), py::arg("packs"),
        R"(The same packs with other documents of the same lengths, and in another order.

Args:     lengths (n,) int32.   order, offsets: a plan of pack_best_fit_decreasing.   documents (n,) int32, a permutation: documents of
          one length take that length's places in this order.   packs (num_packs,) int64, a permutation: the order of the packs.
Returns:  order (n,) int32 and offsets (num_packs + 1,) int64 of the new plan. Runs without the GIL.
Raises:   ValueError for what is no permutation.)");

  m.def(
      "balance_packs", &balance_packs, py::arg("work"), py::arg("ranks"),
      R"(Splits packs over ranks: equally many each, sums of work as equal as greedy placement and swaps make them.

Args:     work (G,) float64, finite, >= 0.   ranks: a divisor of G.
Returns:  (ranks, G / ranks) int32, the packs of each rank in ascending order. Deterministic.
Raises:   ValueError when ranks does not divide G or a value is negative or not finite.)");

  m.def("attention_tiles", &attention_tiles, py::arg("segments"), py::arg("query_tokens"),
        py::arg("key_tokens"),
        R"(Tiles of packed attention for a valid segment table, most work first; empty segments have none.

Args:     segments (S, 4) int32, see nova_kernels.segments.   query_tokens, key_tokens: largest tile sizes.
Returns:  queries (n, 5) int32: q_begin, q_end, segment_begin, prefix_begin, prefix_end;
          keys (m, 5) int32: k_begin, k_end, segment_end, branch_begin, branch_end (0, 0: no branch sees them).)");
}
