// The checks as operators, for the kernels in plain torch (tdpo_ext/ops/torch_kernels.py): each raises what the
// compiled operator of the same arguments raises, and does nothing else. What labels and states hold is looked at on
// the CPU only.
#include "checks.h"

namespace tdpo {
namespace {

void check_rows_operator(const Tensor& logits, const Tensor& ref_logits, const Tensor& labels, int64_t vocab_start,
                         int64_t vocab_size, int64_t ignore_index, double temperature, double softcap,
                         bool reverse_kl) {
  check_rows(logits, ref_logits, labels, {vocab_start, vocab_size, ignore_index, temperature, softcap, reverse_kl});
  if (!labels.device().is_cpu()) return;
  const auto dense = as_contiguous(labels);
  check_label_range({.labels = dense.const_data_ptr<int64_t>(),
                     .rows = dense.numel(),
                     .vocab_size = vocab_size,
                     .ignore_index = ignore_index});
}

template <typename Real>
void check_state_ranges(const Tensor& states, const Tensor& labels, int64_t ignore_index) {
  const auto dense_states = as_contiguous(states), dense_labels = as_contiguous(labels);
  const auto* numbers = dense_states.const_data_ptr<Real>();
  const auto* row_labels = dense_labels.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < labels.numel(); ++row)
    if (row_labels[row] != ignore_index) check_state_range(load_state<false>(numbers, row), row);
}

void check_states_operator(const Tensor& states, const Tensor& labels, int64_t ignore_index) {
  check_states(states, labels);
  if (!labels.device().is_cpu()) return;
  if (states.scalar_type() == ScalarType::Double)
    check_state_ranges<double>(states, labels, ignore_index);
  else
    check_state_ranges<float>(states, labels, ignore_index);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tdpo_ext, CompositeExplicitAutograd, m) {
  m.impl("check_rows", TORCH_BOX(&check_rows_operator));
  m.impl("check_slices", TORCH_BOX(&check_slices));
  m.impl("check_states", TORCH_BOX(&check_states_operator));
  m.impl("check_gradient", TORCH_BOX(&check_gradient_tensors));
}

}  // namespace tdpo
