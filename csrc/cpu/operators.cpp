// The CPU operators. They distribute rows, or slices of the vocabulary when there are few rows, over torch's threads;
// the arithmetic is in row_kernels.cpp.
#include <algorithm>
#include <cstring>

#include "../checks.h"
#include "../kernels_wanted.h"
#include "capability.h"
#include "row_kernels.h"

namespace tdpo {
namespace {

constexpr int64_t kMinSlice = 8192;            // entries below which a slice is not worth a thread
constexpr int64_t kStreamingBytes = 16 << 20;  // outputs larger than this use streaming (non-temporal) stores

const CpuKernels& kernels() {
#if defined(TDPO_X86)
  switch (cpu_capability()) {
    case CpuCapability::avx512:
      return AVX512::kernels;
    case CpuCapability::avx2:
      return AVX2::kernels;
    case CpuCapability::baseline:
      break;
  }
#endif
  return DEFAULT::kernels;
}

// Splits rows x vocabulary into tasks, each a slice of one row.
struct Tasks {
  int64_t rows, vocab, slices;

  explicit Tasks(const DivergenceParams& params, bool whole_rows = false)
      : rows(params.rows), vocab(params.vocab), slices(1) {
    const int64_t threads = torch::stable::get_num_threads(), wanted = 4 * threads;
    if (!whole_rows && rows > 0 && rows < wanted && threads > 1)
      slices = std::max<int64_t>(1, std::min((wanted + rows - 1) / rows, vocab / kMinSlice));
  }

  // Calls f(row, slice, begin, end). `backwards` starts with the rows that an earlier pass left in the cache.
  template <typename F>
  void run(F f, bool backwards = false) const {
    const int64_t length = std::max<int64_t>(1, (vocab + slices - 1) / slices);
    const int64_t grain = std::max<int64_t>(1, kMinSlice / length);
    torch::stable::parallel_for(0, rows * slices, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t task = backwards ? first + last - 1 - i : i;
        const int64_t slice = task % slices, begin = slice * length;
        f(task / slices, slice, begin, std::min(vocab, begin + length));
      }
    });
  }
};

// Calls f(states, reverse) with a pointer to the numbers of `states`, and the direction as a compile-time constant.
template <typename F>
void with_states(const Tensor& states, bool reverse_kl, F f) {
  with_constant(reverse_kl, [&](auto reverse) {
    if (states.scalar_type() == ScalarType::Double)
      f(states.const_data_ptr<double>(), reverse);
    else
      f(states.const_data_ptr<float>(), reverse);
  });
}

Tensor merge_row_states(const Tensor& states, bool reverse_kl) {
  const auto checked = check_merge(states);
  with_states(checked.states, reverse_kl, [&](const auto* in, auto reverse) {
    using Real = std::decay_t<decltype(*in)>;
    auto* out = checked.merged.mutable_data_ptr<Real>();
    torch::stable::parallel_for(0, checked.rows, 256, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        auto merged = RowState<Real, reverse()>::empty();
        for (int64_t slice = 0; slice < checked.slices; ++slice)
          merged.merge(load_state<reverse()>(in, slice * checked.rows + row));
        std::memcpy(out + row * kRowStateSize, &merged, sizeof(merged));
      }
    });
  });
  return checked.merged;
}

Tensor row_states(const Tensor& logits, const Tensor& ref_logits, const Tensor& labels, int64_t vocab_start,
                  int64_t vocab_size, int64_t ignore_index, double temperature, double softcap, bool reverse_kl) {
  const auto inputs = check_inputs(logits, ref_logits, labels,
                                   {vocab_start, vocab_size, ignore_index, temperature, softcap, reverse_kl});
  check_label_range(inputs.params);
  const Tasks tasks(inputs.params);
  const auto states = inputs.empty_states(tasks.slices);
  auto* const out = static_cast<char*>(states.data_ptr());
  const auto bytes = static_cast<int64_t>(kRowStateSize * states.element_size());
  tasks.run([&](int64_t row, int64_t slice, int64_t begin, int64_t end) {
    kernels().row_state(inputs.params, row, begin, end, out + (slice * tasks.rows + row) * bytes);
  });
  return tasks.slices == 1 ? states : merge_row_states(states, reverse_kl);
}

Tensor finalize_row_states(const Tensor& states, const Tensor& labels, int64_t ignore_index, double temperature,
                           bool reverse_kl) {
  const auto checked = check_finalize(states, labels);
  with_states(checked.states, reverse_kl, [&](const auto* in, auto reverse) {
    using Real = std::decay_t<decltype(*in)>;
    const auto* row_labels = checked.labels.const_data_ptr<int64_t>();
    auto* out = checked.values.mutable_data_ptr<Real>();
    for (int64_t row = 0; row < checked.rows; ++row) {
      TokenValues<Real> values{};
      if (row_labels[row] != ignore_index) {
        const auto state = load_state<reverse()>(in, row);
        check_state_range(state, row);
        values = state.finalize(InvTemperature<Real>(temperature));
      }
      values.store(out, checked.rows, row);
    }
  });
  return checked.values;
}

void logit_gradient_out(const Tensor& logits, const Tensor& ref_logits, const Tensor& labels, const Tensor& states,
                        const Tensor& logps_grad, const Tensor& kl_grad, int64_t vocab_start, int64_t vocab_size,
                        int64_t ignore_index, double temperature, double softcap, bool reverse_kl, const Tensor& out) {
  const auto inputs = check_inputs(logits, ref_logits, labels,
                                   {vocab_start, vocab_size, ignore_index, temperature, softcap, reverse_kl});
  check_label_range(inputs.params);
  const auto gradient = check_gradient(logits, ref_logits, labels, states, logps_grad, kl_grad, out);
  const bool narrows = narrows_in_place(out, logits);  // then a slice would overwrite what another has yet to read
  const bool streaming_stores =
      !narrows && !same_memory(out, logits) && out.numel() * static_cast<int64_t>(out.element_size()) > kStreamingBytes;
  const auto write = [&](int64_t row, int64_t, int64_t begin, int64_t end) {
    kernels().logit_gradient(inputs.params, gradient.params, streaming_stores, row, begin, end);
  };
  Tasks(inputs.params, /*whole_rows=*/narrows).run(write, /*backwards=*/true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tdpo_ext, CPU, m) {
  if (!compiled_kernels_are_wanted()) return;
  m.impl("row_states", TORCH_BOX(&row_states));
  m.impl("merge_row_states", TORCH_BOX(&merge_row_states));
  m.impl("finalize_row_states", TORCH_BOX(&finalize_row_states));
  m.impl("logit_gradient_out", TORCH_BOX(&logit_gradient_out));
}

}  // namespace tdpo
