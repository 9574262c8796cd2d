// The schemas of all operators. Each backend registers its kernels next to their code; fake kernels, autograd and the
// kernels in plain torch, for every device without compiled ones, are registered in Python (tdpo_ext/ops,
// tdpo_ext/divergence.py).
#include "stable.h"

STABLE_TORCH_LIBRARY(tdpo_ext, m) {
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
  // out (+)= a @ b in float32, where torch's own products round to the operands' dtype.
  m.def("matmul_float32(Tensor a, Tensor b, *, bool accumulate, Tensor(a!) out) -> ()");
  // The same by brgemm, for arguments that matmul_float32 has checked, and whether it works for a dtype here. Only
  // where the optional module is loaded (cpu/brgemm.cpp).
  m.def("brgemm(Tensor a, Tensor b, *, bool accumulate, Tensor(a!) out) -> ()");
  m.def("has_brgemm(ScalarType dtype) -> bool");
  // An uninitialised CPU tensor for logits, weights and their gradients; large ones reuse memory (cpu/memory.cpp).
  m.def("scratch_empty(int[] size, *, ScalarType dtype) -> Tensor");
  // Frees the memory that scratch_empty keeps for reuse.
  m.def("release_scratch() -> ()");
  // What the operators above check of their arguments, alone: for kernels that are not in C++ (check_operators.cpp).
  m.def(
      "check_rows(Tensor logits, Tensor ref_logits, Tensor labels, *, int vocab_start, int vocab_size, int "
      "ignore_index, float temperature, float softcap, bool reverse_kl) -> ()");
  m.def("check_slices(Tensor states) -> ()");
  m.def("check_states(Tensor states, Tensor labels, *, int ignore_index) -> ()");
  m.def(
      "check_gradient(Tensor logits, Tensor ref_logits, Tensor labels, Tensor states, Tensor logps_grad, Tensor "
      "kl_grad, Tensor out) -> ()");

  // Differentiable: row states, merged over the process group `group_name` that shards the vocabulary ('' for none),
  // and their values (fields, ...).
  m.def(
      "token_divergence(Tensor logits, Tensor ref_logits, Tensor labels, *, int vocab_start, int vocab_size, int "
      "ignore_index, float temperature, float softcap, bool reverse_kl, str group_name) -> (Tensor values, Tensor "
      "states)");
}
