// nova_kernels._C_cuda: kernels for Hopper GPUs over raw device pointers. Every exported function is on this
// screen; pointers and the stream are integers, as torch gives them, so that one build serves every torch
// version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/kv_shift_rope/launch.h"
#include "cuda/linear_logprob/launch.h"
#include "cuda/packed_attention/launch.h"

namespace py = pybind11;

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels for sm_90a; the headers csrc/cuda/*/launch.h are the manual";
  m.def("shift_rope", &nova::shift_rope, py::arg("parts"), py::kw_only(), py::arg("position_T"),
        py::arg("previous_T"), py::arg("tables"), py::arg("tokens"), py::arg("head_dim"), py::arg("sign"),
        py::arg("blocks"), py::arg("stream"));
  m.def("unmix_blocks", &nova::unmix_blocks, py::arg("tokens"));
  m.def("unmix", &nova::unmix, py::kw_only(), py::arg("dy"), py::arg("x"), py::arg("dx"), py::arg("heads"),
        py::arg("mix_X2"), py::arg("partial_BX2"), py::arg("turns"), py::arg("position_T"),
        py::arg("previous_T"), py::arg("offset_T1_and_tokens_J"), py::arg("tables"), py::arg("tokens"),
        py::arg("head_dim"), py::arg("stream"));

  m.def("linear_logprob_fold", &nova::linear_logprob_fold, py::kw_only(), py::arg("x_RD"), py::arg("w_VD"),
        py::arg("target_R"), py::arg("inverse_norm_V"), py::arg("state_5SR"), py::arg("e_RV"),
        py::arg("max_KR"), py::arg("rows"), py::arg("dim"), py::arg("vocab"), py::arg("splits"),
        py::arg("group"), py::arg("clusters"), py::arg("inverse_temperature"), py::arg("entropy"),
        py::arg("argmax"), py::arg("stream"));
  m.def("linear_logprob_dlogits", &nova::linear_logprob_dlogits, py::kw_only(), py::arg("x_RD"),
        py::arg("w_VD"), py::arg("target_R"), py::arg("inverse_norm_V"), py::arg("rows_8R"), py::arg("dz_RW"),
        py::arg("rows"), py::arg("dim"), py::arg("vocab"), py::arg("width"), py::arg("wave_start"),
        py::arg("wave_tiles"), py::arg("group"), py::arg("clusters"), py::arg("inverse_temperature"),
        py::arg("extras"), py::arg("stream"));
  m.def("linear_logprob_stored_dlogits", &nova::linear_logprob_stored_dlogits, py::kw_only(), py::arg("e_RV"),
        py::arg("max_KR"), py::arg("target_R"), py::arg("inverse_norm_V"), py::arg("rows_8R"),
        py::arg("dz_RW"), py::arg("rows"), py::arg("vocab"), py::arg("width"), py::arg("wave_start"),
        py::arg("wave_tiles"), py::arg("extras"), py::arg("stream"));

  py::class_<nova::AttentionShape>(m, "AttentionShape")
      .def(py::init(&nova::attention_shape), py::arg("tokens"), py::arg("heads"), py::arg("kv_heads"),
           py::arg("head_dim"))
      .def_readonly("tokens", &nova::AttentionShape::tokens)
      .def_readonly("heads", &nova::AttentionShape::heads)
      .def_readonly("row_stride", &nova::AttentionShape::row_stride)
      .def_property_readonly("packs", &nova::AttentionShape::packs)
      .def_property_readonly("forward_tokens", &nova::attention_forward_tokens)
      .def_property_readonly("dq_tokens", &nova::attention_dq_tokens)
      .def_property_readonly("key_tokens", [](const nova::AttentionShape&) { return nova::kKeys; });
  m.def("attention_key_parts", &nova::attention_key_parts, py::arg("tiles"), py::arg("kv_heads"));
  m.def("attention_forward", &nova::attention_forward, py::arg("shape"), py::kw_only(), py::arg("q"),
        py::arg("k"), py::arg("v"), py::arg("query_tiles"), py::arg("out"), py::arg("lse2"),
        py::arg("softmax_scale"), py::arg("blocks"), py::arg("stream"));
  m.def("attention_backward", &nova::attention_backward, py::arg("shape"), py::kw_only(), py::arg("q"),
        py::arg("k"), py::arg("v"), py::arg("d_out"), py::arg("query_tiles"), py::arg("key_tiles"),
        py::arg("out"), py::arg("lse2_and_delta"), py::arg("dq_dk_dv"), py::arg("partials"),
        py::arg("softmax_scale"), py::arg("blocks"), py::arg("stream"));
}
