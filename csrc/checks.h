// The checks of shapes, dtypes and devices, once for all backends, and the conversion of tensors to kernel parameters.
// Messages name the argument, what it was and what is allowed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>

#include "params.h"
#include "row_state.h"
#include "stable.h"

namespace tdpo {

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      throw std::invalid_argument(
          joined(name, " has dtype ", tensor.scalar_type(), "; allowed are float32, bfloat16, float16 and float64"));
  }
}

inline ScalarType state_dtype(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::vector<int64_t> with_first(int64_t first, Sizes rest) {
  std::vector<int64_t> sizes{first};
  sizes.insert(sizes.end(), rest.begin(), rest.end());
  return sizes;
}

inline std::vector<int64_t> with_last(Sizes leading, int64_t last) {
  std::vector<int64_t> sizes(leading.begin(), leading.end());
  sizes.push_back(last);
  return sizes;
}

inline void check_matches(const Tensor& tensor, const char* name, Sizes sizes, ScalarType dtype, const Tensor& like) {
  check_value(tensor.sizes().equals(sizes), name, " has shape ", tensor.sizes(), " but ", sizes, " is needed");
  check_value(tensor.scalar_type() == dtype, name, " has dtype ", tensor.scalar_type(), " but ", dtype, " is needed");
  check_value(tensor.device() == like.device(), name, " is on ", tensor.device(), " but logits are on ", like.device());
}

// The rows of `tensor`, if its leading dimensions collapse to at most two and its last dimension is dense.
inline std::optional<RowView> row_view(const Tensor& tensor) {
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
  Tensor logits, ref_logits, labels;
  DivergenceParams params;

  // Uninitialised states of the labels' shape and the state size; with several slices, (slices, ...) of it.
  Tensor empty_states(int64_t slices) const {
    const auto sizes = with_last(labels.sizes(), kRowStateSize);
    return torch::stable::new_empty(logits, slices == 1 ? sizes : with_first(slices, sizes), state_dtype(logits));
  }
};

inline void check_rows(const Tensor& logits, const Tensor& ref_logits, const Tensor& labels,
                       const RowOptions& options) {
  const auto vocab_start = options.vocab_start, vocab_size = options.vocab_size;
  dtype_of(logits, "logits");
  check_value(logits.dim() >= 1, "logits has no dimensions; (..., vocabulary) is needed");
  check_matches(ref_logits, "ref_logits", logits.sizes(), logits.scalar_type(), logits);
  check_matches(labels, "labels", logits.sizes().slice(0, logits.dim() - 1), ScalarType::Long, logits);
  const auto vocab = logits.size(-1);
  check_value(vocab_start >= 0 && vocab <= vocab_size && vocab_start <= vocab_size - vocab, "vocab_start is ",
              vocab_start, " and logits have ", vocab, " entries, but vocab_size is ", vocab_size);
  check_value(options.temperature > 0 && std::isfinite(options.temperature), "temperature is ", options.temperature,
              "; it must be positive and finite");
  check_value(options.softcap >= 0 && std::isfinite(options.softcap), "softcap is ", options.softcap,
              "; it must be positive and finite");
}

// Raises IndexError for a label that is outside the vocabulary and not ignored. The labels are on the CPU.
inline void check_label_range(const DivergenceParams& params) {
  for (int64_t row = 0; row < params.rows; ++row) {
    const int64_t label = params.labels[row];
    check_index(label == params.ignore_index || (label >= 0 && label < params.vocab_size), "labels hold ", label,
                " at row ", row, "; allowed are 0 to ", params.vocab_size - 1, " and ignore_index ",
                params.ignore_index);
  }
}

inline CheckedInputs check_inputs(const Tensor& logits, const Tensor& ref_logits, const Tensor& labels,
                                  const RowOptions& options) {
  check_rows(logits, ref_logits, labels, options);
  const auto [vocab_start, vocab_size, ignore_index, temperature, softcap, reverse_kl] = options;
  CheckedInputs checked{logits, ref_logits, as_contiguous(labels), {}};
  auto z = row_view(checked.logits), r = row_view(checked.ref_logits);
  if (!z) z = row_view(checked.logits = as_contiguous(logits));
  if (!r) r = row_view(checked.ref_logits = as_contiguous(ref_logits));
  checked.params = {
      .logits = *z,
      .ref_logits = *r,
      .labels = checked.labels.const_data_ptr<int64_t>(),
      .rows = labels.numel(),
      .vocab = logits.size(-1),
      .vocab_start = vocab_start,
      .vocab_size = vocab_size,
      .ignore_index = ignore_index,
      .temperature = temperature,
      .softcap = softcap,
      .reverse_kl = reverse_kl,
      .dtype = dtype_of(logits, "logits"),
  };
  return checked;
}

inline void check_state_dtype(const Tensor& states) {
  check_value(states.scalar_type() == ScalarType::Float || states.scalar_type() == ScalarType::Double,
              "states has dtype ", states.scalar_type(), "; allowed are float32 and float64");
}

// The tensors of merge_row_states, the output included.
struct CheckedMerge {
  Tensor states;  // (slices, ..., kRowStateSize)
  Tensor merged;  // (..., kRowStateSize)
  int64_t slices, rows;
};

inline void check_slices(const Tensor& states) {
  check_state_dtype(states);
  check_value(states.dim() >= 2 && states.size(-1) == kRowStateSize, "states has shape ", states.sizes(),
              "; (slices, ..., ", kRowStateSize, ") is needed");
}

inline CheckedMerge check_merge(const Tensor& states) {
  check_slices(states);
  const auto merged = torch::stable::new_empty(states, states.sizes().slice(1));
  return {as_contiguous(states), merged, states.size(0), merged.numel() / kRowStateSize};
}

// The tensors of finalize_row_states, the output included.
struct CheckedFinalize {
  Tensor states;  // (..., kRowStateSize)
  Tensor labels;  // (...)
  Tensor values;  // (kTokenValues, ...)
  int64_t rows;
};

inline void check_states(const Tensor& states, const Tensor& labels) {
  check_state_dtype(states);
  check_matches(labels, "labels", labels.sizes(), ScalarType::Long, states);
  check_matches(states, "states", with_last(labels.sizes(), kRowStateSize), states.scalar_type(), labels);
}

// The state at an index of an array of them, which need not be aligned as one.
template <bool kReverse, typename Real>
RowState<Real, kReverse> load_state(const Real* states, int64_t index) {
  RowState<Real, kReverse> state;
  std::memcpy(&state, states + index * kRowStateSize, sizeof(state));
  return state;
}

// Raises ValueError for a state whose maximum is too large.
template <typename Real, bool kReverse>
void check_state_range(const RowState<Real, kReverse>& state, int64_t row) {
  check_value(!state.is_out_of_range(), "logits or ref_logits have a maximum beyond ", kLargestExponent<Real> * kLn2,
              " (over the temperature) in size at row ", row);
}

inline CheckedFinalize check_finalize(const Tensor& states, const Tensor& labels) {
  check_states(states, labels);
  const auto values = torch::stable::new_empty(states, with_first(kTokenValues, labels.sizes()));
  return {as_contiguous(states), as_contiguous(labels), values, labels.numel()};
}

// Whether two tensors share memory, entry for entry or otherwise.
inline bool same_memory(const Tensor& a, const Tensor& b) {
  return a.data_ptr() == b.data_ptr() && a.scalar_type() == b.scalar_type() && a.strides().equals(b.strides());
}
inline bool may_overlap(const Tensor& a, const Tensor& b) {
  const auto storage_of = [](const Tensor& t) {
    return static_cast<const char*>(t.data_ptr()) - t.storage_offset() * static_cast<int64_t>(t.element_size());
  };
  const auto end_of = [](const Tensor& t) {
    int64_t last = 0;
    for (int64_t dim = 0; dim < t.dim(); ++dim) last += (t.size(dim) - 1) * t.stride(dim);
    return static_cast<const char*>(t.data_ptr()) + (last + 1) * static_cast<int64_t>(t.element_size());
  };
  if (a.numel() == 0 || b.numel() == 0) return false;
  // On some devices an address is a handle, so that those of two storages say nothing.
  const bool has_addresses = a.device().is_cpu() || a.device().is_cuda();
  if (!has_addresses && storage_of(a) != storage_of(b)) return false;
  return static_cast<const char*>(a.data_ptr()) < end_of(b) && static_cast<const char*>(b.data_ptr()) < end_of(a);
}

// Whether each row of `out`, of a narrower dtype, begins where that of `logits` does. An entry then lies before the one
// that it is computed from, so that a row can be written in ascending order while it is read.
inline bool narrows_in_place(const Tensor& out, const Tensor& logits) {
  if (!out.device().is_cpu() || out.data_ptr() != logits.data_ptr() || out.element_size() >= logits.element_size())
    return false;
  bool same_rows = logits.size(-1) == 1 || logits.stride(-1) == 1;
  for (int64_t dim = 0; dim + 1 < out.dim(); ++dim)
    same_rows &= out.size(dim) == 1 || out.stride(dim) * static_cast<int64_t>(out.element_size()) ==
                                           logits.stride(dim) * static_cast<int64_t>(logits.element_size());
  return same_rows;
}

// Whether a tensor has several entries at one address, as expanded tensors have.
inline bool repeats_entries(const Tensor& tensor) {
  bool repeats = false;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) repeats |= tensor.size(dim) > 1 && tensor.stride(dim) == 0;
  return repeats && tensor.numel() > 0;
}

// Whether the entries fill their memory without gaps, in whatever order.
inline bool is_dense(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size), those of one entry left out
  for (int64_t dim = 0; dim < tensor.dim(); ++dim)
    if (tensor.size(dim) != 1) dims.emplace_back(tensor.stride(dim), tensor.size(dim));
  std::sort(dims.begin(), dims.end());
  int64_t dense = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != dense) return tensor.numel() == 0;
    dense *= size;
  }
  return true;
}

// The tensors of logit_gradient_out beside its CheckedInputs.
struct CheckedGradient {
  Tensor states, logps_grad, kl_grad;
  GradientParams params;
};

inline void check_gradient_tensors(const Tensor& logits, const Tensor& ref_logits, const Tensor& labels,
                                   const Tensor& states, const Tensor& logps_grad, const Tensor& kl_grad,
                                   const Tensor& out) {
  const auto real = state_dtype(logits);
  check_matches(states, "states", with_last(labels.sizes(), kRowStateSize), real, logits);
  check_matches(logps_grad, "logps_grad", labels.sizes(), real, logits);
  check_matches(kl_grad, "kl_grad", labels.sizes(), real, logits);
  const bool narrows = logits.scalar_type() == ScalarType::Float &&
                       (out.scalar_type() == ScalarType::BFloat16 || out.scalar_type() == ScalarType::Half);
  check_matches(out, "out", logits.sizes(), narrows ? out.scalar_type() : logits.scalar_type(), logits);
  check_value(row_view(out).has_value(), "out has strides ", out.strides(),
              "; its rows must be dense and its leading dimensions regular");
  check_value(!repeats_entries(out), "out has strides ", out.strides(), ": its entries overlap each other");
  const bool in_place = same_memory(out, logits) || narrows_in_place(out, logits);
  check_value(in_place || !may_overlap(out, logits), "out overlaps logits without being the same memory");
  for (const auto& [name, input] : {std::pair<const char*, const Tensor&>{"ref_logits", ref_logits},
                                    {"states", states},
                                    {"logps_grad", logps_grad},
                                    {"kl_grad", kl_grad},
                                    {"labels", labels}})
    check_value(!may_overlap(out, input) || (in_place && same_memory(input, logits)), "out overlaps ", name);
}

inline CheckedGradient check_gradient(const Tensor& logits, const Tensor& ref_logits, const Tensor& labels,
                                      const Tensor& states, const Tensor& logps_grad, const Tensor& kl_grad,
                                      const Tensor& out) {
  check_gradient_tensors(logits, ref_logits, labels, states, logps_grad, kl_grad, out);
  CheckedGradient checked{as_contiguous(states), as_contiguous(logps_grad), as_contiguous(kl_grad), {}};
  checked.params = {
      .states = checked.states.data_ptr(),
      .logps_grad = checked.logps_grad.data_ptr(),
      .kl_grad = checked.kl_grad.data_ptr(),
      .out = *row_view(out),
      .out_dtype = dtype_of(out, "out"),
  };
  return checked;
}

}  // namespace tdpo
