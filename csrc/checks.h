// The only checks of shapes, dtypes and devices, shared by the backends; and the step from tensors to plain pointers.
// Messages name the argument, what it was and what is allowed.
#pragma once

#include <ATen/ATen.h>

#include <array>

#include "problem.h"
#include "row_state.h"

namespace tdpo {

inline DType dtype_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kDouble:
      return DType::f64;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    default:
      TORCH_CHECK_TYPE(false, name, " has dtype ", tensor.scalar_type(),
                       "; allowed are float32, bfloat16, float16 and float64");
  }
}

inline at::ScalarType state_dtype(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline std::vector<int64_t> with_last(at::IntArrayRef leading, int64_t last) {
  std::vector<int64_t> sizes(leading.begin(), leading.end());
  sizes.push_back(last);
  return sizes;
}

inline void check_matches(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes, at::ScalarType dtype,
                          const at::Tensor& like) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, name, " has shape ", tensor.sizes(), " but ", sizes, " is needed");
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " has dtype ", tensor.scalar_type(), " but ", dtype,
                   " is needed");
  TORCH_CHECK_VALUE(tensor.device() == like.device(), name, " is on ", tensor.device(), " but logits are on ",
                    like.device());
}

// The rows of `tensor` if its leading dimensions collapse to two strides or fewer and its last dimension is dense.
inline std::optional<Rows> rows_of(const at::Tensor& tensor) {
  const auto dims = tensor.dim();
  if (tensor.size(-1) > 1 && tensor.stride(-1) != 1) return std::nullopt;
  // (size, stride) of what is left after merging neighbours, innermost first.
  std::vector<std::pair<int64_t, int64_t>> groups;
  for (int64_t dim = dims - 2; dim >= 0; --dim) {
    const auto size = tensor.size(dim), stride = tensor.stride(dim);
    if (size == 1) continue;
    if (!groups.empty() && stride == groups.back().first * groups.back().second)
      groups.back().first *= size;
    else
      groups.emplace_back(size, stride);
  }
  if (groups.size() > 2) return std::nullopt;
  Rows rows{tensor.data_ptr(), 1, 0, 0};
  if (groups.size() == 1) rows = {tensor.data_ptr(), groups[0].first, groups[0].second, groups[0].second};
  if (groups.size() == 2) rows = {tensor.data_ptr(), groups[0].first, groups[1].second, groups[0].second};
  return rows;
}

// A problem whose tensors are known to be good; it keeps alive what had to be copied.
struct CheckedProblem {
  at::Tensor logits, ref_logits, labels;
  Problem problem;
};

inline CheckedProblem check_problem(const at::Tensor& logits, const at::Tensor& ref_logits, const at::Tensor& labels,
                                    int64_t vocab_start, int64_t vocab_size, int64_t ignore_index, double temperature,
                                    double softcap) {
  const auto dtype = dtype_of(logits, "logits");
  TORCH_CHECK_VALUE(logits.dim() >= 1, "logits has no dimensions; (..., vocabulary) is needed");
  check_matches(ref_logits, "ref_logits", logits.sizes(), logits.scalar_type(), logits);
  check_matches(labels, "labels", logits.sizes().slice(0, logits.dim() - 1), at::kLong, logits);
  const auto vocab = logits.size(-1);
  TORCH_CHECK_VALUE(vocab_start >= 0 && vocab_start + vocab <= vocab_size, "logits hold entries ", vocab_start, " to ",
                    vocab_start + vocab, " but vocab_size is ", vocab_size);
  TORCH_CHECK_VALUE(temperature > 0 && std::isfinite(temperature), "temperature is ", temperature,
                    "; it must be positive and finite");
  TORCH_CHECK_VALUE(softcap >= 0 && std::isfinite(softcap), "softcap is ", softcap, "; it must be positive and finite");
  CheckedProblem checked{logits, ref_logits, labels.contiguous(), {}};
  auto z = rows_of(checked.logits), r = rows_of(checked.ref_logits);
  if (!z) z = rows_of(checked.logits = logits.contiguous());
  if (!r) r = rows_of(checked.ref_logits = ref_logits.contiguous());
  checked.problem = {*z,
                     *r,
                     checked.labels.data_ptr<int64_t>(),
                     labels.numel(),
                     vocab,
                     vocab_start,
                     vocab_size,
                     ignore_index,
                     temperature,
                     softcap,
                     dtype};
  return checked;
}

inline void check_stacked_states(const at::Tensor& states) {
  TORCH_CHECK_VALUE(states.dim() >= 2 && states.size(-1) == kRowStateSize, "states has shape ", states.sizes(),
                    "; (slices, ..., ", kRowStateSize, ") is needed");
}

using FinalValues = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// States of the whole vocabulary, with room for the values they stand for.
struct CheckedValues {
  at::Tensor states, labels;
  std::array<at::Tensor, kTokenValues> values;  // in the order of TokenValues

  CheckedValues(const at::Tensor& given_states, const at::Tensor& given_labels)
      : states(given_states.contiguous()), labels(given_labels.contiguous()) {
    dtype_of(states, "states");
    check_matches(labels, "labels", labels.sizes(), at::kLong, states);
    check_matches(states, "states", with_last(labels.sizes(), kRowStateSize), states.scalar_type(), labels);
    for (auto& value : values) value = at::empty(labels.sizes(), states.options());
  }
  FinalValues tuple() const { return {values[0], values[1], values[2], values[3], values[4]}; }
};

struct CheckedGradient {
  at::Tensor states, logp_grad, kl_grad;
  Gradient gradient;
};

inline CheckedGradient check_gradient(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& states,
                                      const at::Tensor& logp_grad, const at::Tensor& kl_grad, const at::Tensor& out) {
  const auto real = state_dtype(logits);
  check_matches(states, "states", with_last(labels.sizes(), kRowStateSize), real, logits);
  check_matches(logp_grad, "logp_grad", labels.sizes(), real, logits);
  check_matches(kl_grad, "kl_grad", labels.sizes(), real, logits);
  const bool narrows =
      logits.scalar_type() == at::kFloat && (out.scalar_type() == at::kBFloat16 || out.scalar_type() == at::kHalf);
  check_matches(out, "out", logits.sizes(), narrows ? out.scalar_type() : logits.scalar_type(), logits);
  const auto rows = rows_of(out);
  TORCH_CHECK_VALUE(rows, "out has strides ", out.strides(),
                    "; its rows must be dense and its leading dimensions regular");
  CheckedGradient checked{states.contiguous(), logp_grad.contiguous(), kl_grad.contiguous(), {}};
  checked.gradient = {checked.states.data_ptr(),  checked.logp_grad.data_ptr(),
                      checked.kl_grad.data_ptr(), *rows,
                      dtype_of(out, "out"),       false};
  return checked;
}

}  // namespace tdpo
