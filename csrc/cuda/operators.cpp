// The CUDA operators: checks, outputs, device guard and current stream around the kernel launchers.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "launch.h"

namespace tdpo::cuda {
namespace {

cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

int multiprocessors() {
  int device = 0, count = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

StateKind state_kind(const at::Tensor& states, bool reverse_kl) {
  return {.is_double = states.scalar_type() == at::kDouble, .reverse_kl = reverse_kl};
}

at::Tensor merge_row_states(const at::Tensor& states, bool reverse_kl) {
  const auto checked = check_merge(states);
  const c10::cuda::CUDAGuard guard(states.device());
  launch_merge(checked.states.data_ptr(), state_kind(checked.states, reverse_kl), checked.slices, checked.rows,
               checked.merged.data_ptr(), current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return checked.merged;
}

at::Tensor row_states(const at::Tensor& logits, const at::Tensor& ref_logits, const at::Tensor& labels,
                      int64_t vocab_start, int64_t vocab_size, int64_t ignore_index, double temperature, double softcap,
                      bool reverse_kl) {
  const auto inputs = check_inputs(logits, ref_logits, labels,
                                   {vocab_start, vocab_size, ignore_index, temperature, softcap, reverse_kl});
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto slices = row_slices(inputs.params.rows, inputs.params.vocab, multiprocessors());
  const auto states = inputs.empty_states(slices);
  launch_row_states(inputs.params, states.data_ptr(), slices, current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return slices == 1 ? states.squeeze(0) : merge_row_states(states, reverse_kl);
}

at::Tensor finalize_row_states(const at::Tensor& states, const at::Tensor& labels, int64_t ignore_index,
                               double temperature, bool reverse_kl) {
  const auto checked = check_finalize(states, labels);
  const c10::cuda::CUDAGuard guard(states.device());
  launch_finalize(checked.states.data_ptr(), state_kind(checked.states, reverse_kl),
                  checked.labels.const_data_ptr<int64_t>(), checked.rows, ignore_index, temperature,
                  checked.values.data_ptr(), current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return checked.values;
}

void logit_gradient_out(const at::Tensor& logits, const at::Tensor& ref_logits, const at::Tensor& labels,
                        const at::Tensor& states, const at::Tensor& logps_grad, const at::Tensor& kl_grad,
                        int64_t vocab_start, int64_t vocab_size, int64_t ignore_index, double temperature,
                        double softcap, bool reverse_kl, const at::Tensor& out) {
  const auto inputs = check_inputs(logits, ref_logits, labels,
                                   {vocab_start, vocab_size, ignore_index, temperature, softcap, reverse_kl});
  const auto gradient = check_gradient(logits, ref_logits, labels, states, logps_grad, kl_grad, out);
  const c10::cuda::CUDAGuard guard(logits.device());
  launch_gradient(inputs.params, gradient.params, current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void scale_unless_one(const at::Tensor& tensor, const at::Tensor& factor) {
  const auto dtype = dtype_of(tensor, "tensor");
  TORCH_CHECK_VALUE(tensor.is_non_overlapping_and_dense(), "tensor has strides ", tensor.strides(),
                    "; it must be dense");
  check_matches(factor, "factor", {}, state_dtype(tensor), tensor);
  const c10::cuda::CUDAGuard guard(tensor.device());
  launch_scale(tensor.data_ptr(), dtype, tensor.numel(), factor.data_ptr(), multiprocessors(), current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

TORCH_LIBRARY_IMPL(tdpo_ext, CUDA, m) {
  m.impl("row_states", &row_states);
  m.impl("merge_row_states", &merge_row_states);
  m.impl("finalize_row_states", &finalize_row_states);
  m.impl("logit_gradient_out", &logit_gradient_out);
  m.impl("scale_unless_one", &scale_unless_one);
}

}  // namespace tdpo::cuda
