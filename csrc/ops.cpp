// The schemas of all operators, and the Python module. Each backend registers its kernels next to their code; fake
// kernels and autograd are registered in Python (tdpo_ext/ops/operators.py, tdpo_ext/divergence.py).
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "build_info.h"

TORCH_LIBRARY(tdpo_ext, m) {
  // set_python_module names the module that registers the fake kernels of the operators that follow.
  m.set_python_module("tdpo_ext.ops.operators");

  // Row states (csrc/row_state.h) of one slice of the vocabulary: (..., V) -> (..., kRowStateSize).
  m.def(
      "row_states(Tensor logits, Tensor ref_logits, Tensor labels, *, int vocab_start, int vocab_size, int "
      "ignore_index, float temperature, float softcap, bool reverse_kl) -> Tensor");
  // Merges the states of several slices: (slices, ..., kRowStateSize) -> (..., kRowStateSize).
  m.def("merge_row_states(Tensor states, *, bool reverse_kl) -> Tensor");
  // States of the whole vocabulary -> values (fields, ...), the fields of struct TokenValues in its order.
  m.def(
      "finalize_row_states(Tensor states, Tensor labels, *, int ignore_index, float temperature, bool reverse_kl) -> "
      "Tensor");
  // dL/dlogits from dL/dlogps and dL/dkl; the second form writes into `out`, which may be `logits` itself.
  m.def(
      "logit_gradient(Tensor logits, Tensor ref_logits, Tensor labels, Tensor states, Tensor logps_grad, "
      "Tensor kl_grad, *, int vocab_start, int vocab_size, int ignore_index, float temperature, float softcap, "
      "bool reverse_kl) -> Tensor");
  m.def(
      "logit_gradient_out(Tensor logits, Tensor ref_logits, Tensor labels, Tensor states, Tensor logps_grad, "
      "Tensor kl_grad, *, int vocab_start, int vocab_size, int ignore_index, float temperature, float softcap, "
      "bool reverse_kl, Tensor(a!) out) -> ()");
  // tensor *= factor, at no cost when factor is 1; on CUDA without a synchronisation.
  m.def("scale_unless_one(Tensor(a!) tensor, Tensor factor) -> ()");
  // out (+)= a @ b in float32 (CPU only: torch's own products round to the operands' dtype).
  m.def("matmul_float32(Tensor a, Tensor b, *, bool accumulate, Tensor(a!) out) -> ()");
  // An uninitialised CPU tensor for logits, weights and their gradients; large ones reuse memory (cpu/memory.cpp).
  m.def("scratch_empty(int[] size, *, ScalarType dtype) -> Tensor");
  // Frees the memory that scratch_empty keeps for reuse.
  m.def("release_scratch() -> ()");

  m.set_python_module("tdpo_ext.divergence");
  // Differentiable: row states, merged over the process group `group_name` that shards the vocabulary ('' for none),
  // and their values (fields, ...).
  m.def(
      "token_divergence(Tensor logits, Tensor ref_logits, Tensor labels, *, int vocab_start, int vocab_size, int "
      "ignore_index, float temperature, float softcap, bool reverse_kl, str group_name) -> (Tensor values, Tensor "
      "states)");
}

PYBIND11_MODULE(_C, m) { m.def("build_info", &tdpo::build_info); }
