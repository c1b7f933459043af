// nova_kernels._C: host code over numpy buffers. Every exported function is on this screen.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

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
Returns:  order (n,) int64, document indices grouped by pack; offsets (num_packs + 1,) int64: pack p holds
          order[offsets[p]:offsets[p + 1]], in the order of placement.
Raises:   ValueError for a length outside 1..capacity (index and value in the message).)");

  m.def(
      "balance_packs", &balance_packs, py::arg("work"), py::arg("ranks"),
      R"(Splits packs over ranks: equally many each, sums of work as equal as greedy placement and swaps make them.

Args:     work (G,) float64, finite, >= 0.   ranks: a divisor of G.
Returns:  (ranks, G / ranks) int32, the packs of each rank in ascending order. Deterministic.
Raises:   ValueError when ranks does not divide G or a value is negative or not finite.)");
}
