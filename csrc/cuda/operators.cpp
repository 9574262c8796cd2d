// The CUDA operators: checks, outputs, device guard and current stream around the kernel launchers.
#include <cuda_runtime_api.h>

#include "../checks.h"
#include "../kernels_wanted.h"
#include "launch.h"

namespace tdpo::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

// torch's current stream on the device of `tensor`.
cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

int multiprocessors() {
  int device = 0, count = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

StateKind state_kind(const Tensor& states, bool reverse_kl) {
  return {.is_double = states.scalar_type() == ScalarType::Double, .reverse_kl = reverse_kl};
}

Tensor merge_row_states(const Tensor& states, bool reverse_kl) {
  const auto checked = check_merge(states);
  const DeviceGuard guard(states.get_device_index());
  launch_merge(checked.states.data_ptr(), state_kind(checked.states, reverse_kl), checked.slices, checked.rows,
               checked.merged.data_ptr(), stream_of(states));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return checked.merged;
}

Tensor row_states(const Tensor& logits, const Tensor& ref_logits, const Tensor& labels, int64_t vocab_start,
                  int64_t vocab_size, int64_t ignore_index, double temperature, double softcap, bool reverse_kl) {
  const auto inputs = check_inputs(logits, ref_logits, labels,
                                   {vocab_start, vocab_size, ignore_index, temperature, softcap, reverse_kl});
  const DeviceGuard guard(logits.get_device_index());
  const auto slices = row_slices(inputs.params.rows, inputs.params.vocab, multiprocessors());
  const auto states = inputs.empty_states(slices);
  launch_row_states(inputs.params, states.data_ptr(), slices, stream_of(logits));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return slices == 1 ? states : merge_row_states(states, reverse_kl);
}

Tensor finalize_row_states(const Tensor& states, const Tensor& labels, int64_t ignore_index, double temperature,
                           bool reverse_kl) {
  const auto checked = check_finalize(states, labels);
  const DeviceGuard guard(states.get_device_index());
  launch_finalize(checked.states.data_ptr(), state_kind(checked.states, reverse_kl),
                  checked.labels.const_data_ptr<int64_t>(), checked.rows, ignore_index, temperature,
                  checked.values.data_ptr(), stream_of(states));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return checked.values;
}

void logit_gradient_out(const Tensor& logits, const Tensor& ref_logits, const Tensor& labels, const Tensor& states,
                        const Tensor& logps_grad, const Tensor& kl_grad, int64_t vocab_start, int64_t vocab_size,
                        int64_t ignore_index, double temperature, double softcap, bool reverse_kl, const Tensor& out) {
  const auto inputs = check_inputs(logits, ref_logits, labels,
                                   {vocab_start, vocab_size, ignore_index, temperature, softcap, reverse_kl});
  const auto gradient = check_gradient(logits, ref_logits, labels, states, logps_grad, kl_grad, out);
  const DeviceGuard guard(logits.get_device_index());
  launch_gradient(inputs.params, gradient.params, stream_of(logits));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void scale_unless_one(const Tensor& tensor, const Tensor& factor) {
  const auto dtype = dtype_of(tensor, "tensor");
  check_value(is_dense(tensor), "tensor has strides ", tensor.strides(), "; it must be dense");
  check_matches(factor, "factor", {}, state_dtype(tensor), tensor);
  const DeviceGuard guard(tensor.get_device_index());
  launch_scale(tensor.data_ptr(), dtype, tensor.numel(), factor.data_ptr(), multiprocessors(), stream_of(tensor));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tdpo_ext, CUDA, m) {
  if (!compiled_kernels_are_wanted()) return;
  m.impl("row_states", TORCH_BOX(&row_states));
  m.impl("merge_row_states", TORCH_BOX(&merge_row_states));
  m.impl("finalize_row_states", TORCH_BOX(&finalize_row_states));
  m.impl("logit_gradient_out", TORCH_BOX(&logit_gradient_out));
  m.impl("scale_unless_one", TORCH_BOX(&scale_unless_one));
}

}  // namespace tdpo::cuda
