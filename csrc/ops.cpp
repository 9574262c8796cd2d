// Operator schemas and the Python module. Backends register their kernels beside their code; fake kernels and
// autograd are in tdpo_ext/ops.py.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "build_info.h"

TORCH_LIBRARY(tdpo_ext, m) {
  m.set_python_module("tdpo_ext.ops");

  // Row states (csrc/row_state.h) of one slice of the vocabulary: (..., V) -> (..., state size).
  m.def(
      "row_states(Tensor logits, Tensor ref_logits, Tensor labels, int vocab_start, int vocab_size, int ignore_index, "
      "float temperature, float softcap) -> Tensor");
  // States of several slices -> states of the whole: (slices, ..., state size) -> (..., state size).
  m.def("merge_row_states(Tensor states) -> Tensor");
  // States of the whole vocabulary -> values; correct is 1 where no entry of the policy beats the label, else 0.
  m.def(
      "finalize_row_states(Tensor states, Tensor labels, int ignore_index, float temperature) -> (Tensor logps, Tensor "
      "ref_logps, Tensor kl, Tensor entropy, Tensor correct)");
  // dL/dlogits from dL/dlogps and dL/dkl; the second form writes into `out`, which may be `logits` itself.
  m.def(
      "logit_gradient(Tensor logits, Tensor ref_logits, Tensor labels, Tensor states, Tensor logp_grad, Tensor "
      "kl_grad, "
      "int vocab_start, int vocab_size, int ignore_index, float temperature, float softcap) -> Tensor");
  m.def(
      "logit_gradient_out(Tensor logits, Tensor ref_logits, Tensor labels, Tensor states, Tensor logp_grad, Tensor "
      "kl_grad, int vocab_start, int vocab_size, int ignore_index, float temperature, float softcap, Tensor(a!) out) "
      "-> "
      "()");
  // The differentiable whole; `group_name` names the process group that shards the vocabulary, '' for none.
  m.def(
      "token_divergence(Tensor logits, Tensor ref_logits, Tensor labels, int vocab_start, int vocab_size, int "
      "ignore_index, float temperature, float softcap, str group_name) -> (Tensor logps, Tensor ref_logps, Tensor kl, "
      "Tensor entropy, Tensor states)");
  // tensor *= factor, in no time where factor is 1 and, on CUDA, without asking the device what it is.
  m.def("scale_unless_one(Tensor(a!) tensor, Tensor factor) -> ()");
  // out (+)= a @ b in float32 (CPU; torch's own products round to the operands' dtype).
  m.def("matmul_float32(Tensor a, Tensor b, bool accumulate, Tensor(a!) out) -> ()");
}

PYBIND11_MODULE(_C, m) { m.def("build_info", &tdpo::build_info); }
