// nova_kernels._C_cuda: kernels for Hopper GPUs over raw device pointers. Every exported function is on this
// screen; pointers and the stream are integers, as torch gives them, so that one build serves every torch
// version.
#include <pybind11/pybind11.h>

#include "cuda/linear_logprob/launch.h"

namespace py = pybind11;

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels for sm_90a; the headers csrc/cuda/*/launch.h are the manual";
  m.def("linear_logprob_fwd", &nova::linear_logprob_fwd, py::arg("x_RD"), py::arg("w_VD"),
        py::arg("target_R"), py::arg("part_S3R"), py::kw_only(), py::arg("rows"), py::arg("dim"),
        py::arg("vocab"), py::arg("splits"), py::arg("scale"), py::arg("stream"));
}
