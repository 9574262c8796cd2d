// The checks of shapes, dtypes and devices, once for both backends, and the conversion of tensors to kernel parameters.
// Messages name the argument, what it was and what is allowed.
#pragma once

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>

#include "params.h"
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

inline std::vector<int64_t> with_first(int64_t first, at::IntArrayRef rest) {
  std::vector<int64_t> sizes{first};
  sizes.insert(sizes.end(), rest.begin(), rest.end());
  return sizes;
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

// The rows of `tensor`, if its leading dimensions collapse to at most two and its last dimension is dense.
inline std::optional<RowView> row_view(const at::Tensor& tensor) {
  const auto dims = tensor.dim();
  if (tensor.size(-1) > 1 && tensor.stride(-1) != 1) return std::nullopt;
  // (size, stride) of the dimensions that remain after collapsing neighbours, innermost first.
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
  RowView rows{tensor.data_ptr(), 1, 0, 0};
  if (groups.size() == 1) rows = {tensor.data_ptr(), groups[0].first, groups[0].second, groups[0].second};
  if (groups.size() == 2) rows = {tensor.data_ptr(), groups[0].first, groups[1].second, groups[0].second};
  return rows;
}

// The options of the row operators, in the order of their schemas.
struct RowOptions {
  int64_t vocab_start, vocab_size, ignore_index;
  double temperature, softcap;
  bool reverse_kl;
};

// Logits and labels that passed the checks, and the kernel parameters that point into them.
struct CheckedInputs {
  at::Tensor logits, ref_logits, labels;
  DivergenceParams params;

  // Uninitialised states, (slices, ...) of the labels' shape and the state size.
  at::Tensor empty_states(int64_t slices) const {
    return at::empty(with_first(slices, with_last(labels.sizes(), kRowStateSize)),
                     logits.options().dtype(state_dtype(logits)));
  }
};

inline CheckedInputs check_inputs(const at::Tensor& logits, const at::Tensor& ref_logits, const at::Tensor& labels,
                                  const RowOptions& options) {
  const auto [vocab_start, vocab_size, ignore_index, temperature, softcap, reverse_kl] = options;
  const auto dtype = dtype_of(logits, "logits");
  TORCH_CHECK_VALUE(logits.dim() >= 1, "logits has no dimensions; (..., vocabulary) is needed");
  check_matches(ref_logits, "ref_logits", logits.sizes(), logits.scalar_type(), logits);
  check_matches(labels, "labels", logits.sizes().slice(0, logits.dim() - 1), at::kLong, logits);
  const auto vocab = logits.size(-1);
  TORCH_CHECK_VALUE(vocab_start >= 0 && vocab <= vocab_size && vocab_start <= vocab_size - vocab, "vocab_start is ",
                    vocab_start, " and logits have ", vocab, " entries, but vocab_size is ", vocab_size);
  TORCH_CHECK_VALUE(temperature > 0 && std::isfinite(temperature), "temperature is ", temperature,
                    "; it must be positive and finite");
  TORCH_CHECK_VALUE(softcap >= 0 && std::isfinite(softcap), "softcap is ", softcap, "; it must be positive and finite");
  CheckedInputs checked{logits, ref_logits, labels.contiguous(), {}};
  auto z = row_view(checked.logits), r = row_view(checked.ref_logits);
  if (!z) z = row_view(checked.logits = logits.contiguous());
  if (!r) r = row_view(checked.ref_logits = ref_logits.contiguous());
  checked.params = {
      .logits = *z,
      .ref_logits = *r,
      .labels = checked.labels.data_ptr<int64_t>(),
      .rows = labels.numel(),
      .vocab = vocab,
      .vocab_start = vocab_start,
      .vocab_size = vocab_size,
      .ignore_index = ignore_index,
      .temperature = temperature,
      .softcap = softcap,
      .reverse_kl = reverse_kl,
      .dtype = dtype,
  };
  return checked;
}

inline void check_state_dtype(const at::Tensor& states) {
  TORCH_CHECK_TYPE(states.scalar_type() == at::kFloat || states.scalar_type() == at::kDouble, "states has dtype ",
                   states.scalar_type(), "; allowed are float32 and float64");
}

// The tensors of merge_row_states, the output included.
struct CheckedMerge {
  at::Tensor states;  // (slices, ..., kRowStateSize)
  at::Tensor merged;  // (..., kRowStateSize)
  int64_t slices, rows;
};

inline CheckedMerge check_merge(const at::Tensor& states) {
  check_state_dtype(states);
  TORCH_CHECK_VALUE(states.dim() >= 2 && states.size(-1) == kRowStateSize, "states has shape ", states.sizes(),
                    "; (slices, ..., ", kRowStateSize, ") is needed");
  const auto merged = at::empty(states.sizes().slice(1), states.options());
  return {states.contiguous(), merged, states.size(0), merged.numel() / kRowStateSize};
}

// The tensors of finalize_row_states, the output included.
struct CheckedFinalize {
  at::Tensor states;  // (..., kRowStateSize)
  at::Tensor labels;  // (...)
  at::Tensor values;  // (kTokenValues, ...)
  int64_t rows;
};

inline CheckedFinalize check_finalize(const at::Tensor& states, const at::Tensor& labels) {
  check_state_dtype(states);
  check_matches(labels, "labels", labels.sizes(), at::kLong, states);
  check_matches(states, "states", with_last(labels.sizes(), kRowStateSize), states.scalar_type(), labels);
  const auto values = at::empty(with_first(kTokenValues, labels.sizes()), states.options());
  return {states.contiguous(), labels.contiguous(), values, labels.numel()};
}

// Whether two tensors share memory, entry for entry or otherwise.
inline bool same_memory(const at::Tensor& a, const at::Tensor& b) {
  return a.data_ptr() == b.data_ptr() && a.scalar_type() == b.scalar_type() && a.strides() == b.strides();
}
inline bool may_overlap(const at::Tensor& a, const at::Tensor& b) {
  const auto end_of = [](const at::Tensor& t) {
    int64_t last = 0;
    for (int64_t dim = 0; dim < t.dim(); ++dim) last += (t.size(dim) - 1) * t.stride(dim);
    return static_cast<const char*>(t.data_ptr()) + (last + 1) * t.element_size();
  };
  if (a.numel() == 0 || b.numel() == 0) return false;
  return static_cast<const char*>(a.data_ptr()) < end_of(b) && static_cast<const char*>(b.data_ptr()) < end_of(a);
}

// The tensors of logit_gradient_out beside its CheckedInputs.
struct CheckedGradient {
  at::Tensor states, logps_grad, kl_grad;
  GradientParams params;
};

inline CheckedGradient check_gradient(const at::Tensor& logits, const at::Tensor& ref_logits, const at::Tensor& labels,
                                      const at::Tensor& states, const at::Tensor& logps_grad, const at::Tensor& kl_grad,
                                      const at::Tensor& out) {
  const auto real = state_dtype(logits);
  check_matches(states, "states", with_last(labels.sizes(), kRowStateSize), real, logits);
  check_matches(logps_grad, "logps_grad", labels.sizes(), real, logits);
  check_matches(kl_grad, "kl_grad", labels.sizes(), real, logits);
  const bool narrows =
      logits.scalar_type() == at::kFloat && (out.scalar_type() == at::kBFloat16 || out.scalar_type() == at::kHalf);
  check_matches(out, "out", logits.sizes(), narrows ? out.scalar_type() : logits.scalar_type(), logits);
  const auto rows = row_view(out);
  TORCH_CHECK_VALUE(rows, "out has strides ", out.strides(),
                    "; its rows must be dense and its leading dimensions regular");
  TORCH_CHECK_VALUE(out.numel() < 2 || at::has_internal_overlap(out) != at::MemOverlap::Yes, "out has strides ",
                    out.strides(), ": its entries overlap each other");
  TORCH_CHECK_VALUE(same_memory(out, logits) || !may_overlap(out, logits),
                    "out overlaps logits without being the same memory");
  for (const auto& [name, input] : {std::pair<const char*, const at::Tensor&>{"ref_logits", ref_logits},
                                    {"states", states},
                                    {"logps_grad", logps_grad},
                                    {"kl_grad", kl_grad},
                                    {"labels", labels}})
    TORCH_CHECK_VALUE(!may_overlap(out, input) || (input.is_same(logits) && same_memory(out, logits)), "out overlaps ",
                      name);
  CheckedGradient checked{states.contiguous(), logps_grad.contiguous(), kl_grad.contiguous(), {}};
  checked.params = {
      .states = checked.states.data_ptr(),
      .logps_grad = checked.logps_grad.data_ptr(),
      .kl_grad = checked.kl_grad.data_ptr(),
      .out = *rows,
      .out_dtype = dtype_of(out, "out"),
  };
  return checked;
}

}  // namespace tdpo
