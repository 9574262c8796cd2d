// The CPU operators: they share rows, or slices of the vocabulary when rows are few, among torch's threads and leave
// the arithmetic to row_kernels.cpp.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include "../checks.h"
#include "kernels.h"

namespace tdpo {
namespace {

// Entries below which a slice of a row is not worth a thread.
constexpr int64_t kMinSlice = 8192;
// Outputs above this many bytes are written past the cache.
constexpr int64_t kStreamingBytes = 16 << 20;

const CpuKernels& kernels() {
#if defined(TDPO_X86)
  static const CpuKernels& chosen = [&]() -> const CpuKernels& {
    const auto capability = at::get_cpu_capability();  // obeys ATEN_CPU_CAPABILITY
    if (capability == "AVX512") return AVX512::kernels;
    if (capability == "AVX2") return AVX2::kernels;
    return DEFAULT::kernels;
  }();
  return chosen;
#else
  return DEFAULT::kernels;
#endif
}

// Cuts rows x vocabulary into tasks: f(row, slice, begin, end).
struct Tasks {
  int64_t rows, vocab, slices;

  explicit Tasks(const Problem& problem) : rows(problem.rows), vocab(problem.vocab), slices(1) {
    const int64_t wanted = 4 * at::get_num_threads();
    if (rows > 0 && rows < wanted && at::get_num_threads() > 1)
      slices = std::max<int64_t>(1, std::min((wanted + rows - 1) / rows, vocab / kMinSlice));
  }

  // `backwards` starts with the rows that an earlier pass left in the cache.
  template <typename F>
  void run(F f, bool backwards = false) const {
    const int64_t length = std::max<int64_t>(1, (vocab + slices - 1) / slices);
    const int64_t grain = std::max<int64_t>(1, kMinSlice / length);
    at::parallel_for(0, rows * slices, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t task = backwards ? first + last - 1 - i : i;
        const int64_t slice = task % slices, begin = slice * length;
        f(task / slices, slice, begin, std::min(vocab, begin + length));
      }
    });
  }
};

void check_label_range(const Problem& problem) {
  for (int64_t row = 0; row < problem.rows; ++row) {
    const int64_t label = problem.labels[row];
    TORCH_CHECK_INDEX(label == problem.ignore_index || (label >= 0 && label < problem.vocab_size), "labels hold ",
                      label, " at row ", row, "; allowed are 0 to ", problem.vocab_size - 1, " and ignore_index ",
                      problem.ignore_index);
  }
}

template <typename Real>
void merge_states(const Real* states, int64_t slices, int64_t stride, Real* merged) {
  auto total = RowState<Real>::empty();
  for (int64_t slice = 0; slice < slices; ++slice) {
    RowState<Real> state;
    std::memcpy(&state, states + slice * stride, sizeof(state));
    total.merge(state);
  }
  std::memcpy(merged, &total, sizeof(total));
}

at::Tensor merge_row_states(const at::Tensor& stacked) {
  check_stacked_states(stacked);
  const auto states = stacked.contiguous();
  auto merged = at::empty(states.sizes().slice(1), states.options());
  const int64_t rows = merged.numel() / kRowStateSize;
  AT_DISPATCH_FLOATING_TYPES(states.scalar_type(), "merge_row_states", [&] {
    const auto* in = states.const_data_ptr<scalar_t>();
    auto* out = merged.data_ptr<scalar_t>();
    at::parallel_for(0, rows, 256, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row)
        merge_states(in + row * kRowStateSize, states.size(0), rows * kRowStateSize, out + row * kRowStateSize);
    });
  });
  return merged;
}

at::Tensor row_states(const at::Tensor& logits, const at::Tensor& ref_logits, const at::Tensor& labels,
                      int64_t vocab_start, int64_t vocab_size, int64_t ignore_index, double temperature,
                      double softcap) {
  const auto checked =
      check_problem(logits, ref_logits, labels, vocab_start, vocab_size, ignore_index, temperature, softcap);
  check_label_range(checked.problem);
  const Tasks tasks(checked.problem);
  const auto options = logits.options().dtype(state_dtype(logits));
  auto sizes = with_last(labels.sizes(), kRowStateSize);
  sizes.insert(sizes.begin(), tasks.slices);
  const auto states = at::empty(sizes, options);
  auto* const out = static_cast<char*>(states.data_ptr());
  const int64_t bytes = kRowStateSize * states.element_size();
  tasks.run([&](int64_t row, int64_t slice, int64_t begin, int64_t end) {
    kernels().row_state(checked.problem, row, begin, end, out + (slice * tasks.rows + row) * bytes);
  });
  return tasks.slices == 1 ? states.squeeze(0) : merge_row_states(states);
}

FinalValues finalize_row_states(const at::Tensor& given_states, const at::Tensor& given_labels, int64_t ignore_index,
                                double temperature) {
  const CheckedValues checked(given_states, given_labels);
  AT_DISPATCH_FLOATING_TYPES(checked.states.scalar_type(), "finalize_row_states", [&] {
    const auto* in = checked.states.const_data_ptr<scalar_t>();
    const auto* labels = checked.labels.const_data_ptr<int64_t>();
    scalar_t* out[kTokenValues];
    for (int i = 0; i < kTokenValues; ++i) out[i] = checked.values[i].data_ptr<scalar_t>();
    for (int64_t row = 0; row < checked.labels.numel(); ++row) {
      TokenValues<scalar_t> values{};
      if (labels[row] != ignore_index) {
        RowState<scalar_t> state;
        std::memcpy(&state, in + row * kRowStateSize, sizeof(state));
        values = state.finalize(Temper<scalar_t>(temperature));
      }
      out[0][row] = values.logp;
      out[1][row] = values.ref_logp;
      out[2][row] = values.kl;
      out[3][row] = values.entropy;
      out[4][row] = values.correct;
    }
  });
  return checked.tuple();
}

void logit_gradient_out(const at::Tensor& logits, const at::Tensor& ref_logits, const at::Tensor& labels,
                        const at::Tensor& states, const at::Tensor& logp_grad, const at::Tensor& kl_grad,
                        int64_t vocab_start, int64_t vocab_size, int64_t ignore_index, double temperature,
                        double softcap, const at::Tensor& out) {
  const auto checked =
      check_problem(logits, ref_logits, labels, vocab_start, vocab_size, ignore_index, temperature, softcap);
  auto upstream = check_gradient(logits, labels, states, logp_grad, kl_grad, out);
  upstream.gradient.streaming_stores = !out.is_alias_of(logits) && out.numel() * out.element_size() > kStreamingBytes;
  Tasks(checked.problem)
      .run([&](int64_t row, int64_t, int64_t begin,
               int64_t end) { kernels().logit_gradient(checked.problem, upstream.gradient, row, begin, end); },
           true);
}

void scale_unless_one(const at::Tensor& tensor, const at::Tensor& factor) {
  if (factor.item<double>() != 1) tensor.mul_(factor);
}

}  // namespace

TORCH_LIBRARY_IMPL(tdpo_ext, CPU, m) {
  m.impl("row_states", &row_states);
  m.impl("merge_row_states", &merge_row_states);
  m.impl("finalize_row_states", &finalize_row_states);
  m.impl("logit_gradient_out", &logit_gradient_out);
  m.impl("scale_unless_one", &scale_unless_one);
}

}  // namespace tdpo
