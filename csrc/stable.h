// What the operators use of torch: its stable ABI alone (torch/csrc/stable), so that one binary loads in every torch
// from TORCH_TARGET_VERSION (CMakeLists.txt) on. The source builds with the headers of all of them too, so it uses only
// what the oldest has: the checks of errors, for one, come from other headers there than in later releases.
//
// Errors are standard exceptions, which arrive in Python as their counterparts: std::invalid_argument as ValueError,
// std::out_of_range as IndexError, std::bad_alloc as MemoryError. From torch 2.15 on, only IndexError does; the others
// are RuntimeErrors there, with the same message.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace tdpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline void write(std::ostream& out, Sizes sizes) {
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i == 0 ? "" : ", ") << sizes[i];
  out << ']';
}
inline void write(std::ostream& out, const torch::stable::Device& device) {
  out << (device.is_cpu() ? "cpu" : device.is_cuda() ? "cuda" : "another device");
  if (device.has_index()) out << ':' << device.index();
}
template <typename T>
void write(std::ostream& out, const T& value) {
  out << value;
}

template <typename... Parts>
std::string joined(const Parts&... parts) {
  std::ostringstream message;
  (write(message, parts), ...);
  return message.str();
}

// Raises ValueError with the message that `parts` make unless `condition` holds.
template <typename... Parts>
void check_value(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]]
    throw std::invalid_argument(joined(parts...));
}

// Likewise IndexError.
template <typename... Parts>
void check_index(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]]
    throw std::out_of_range(joined(parts...));
}

// `tensor` itself where it is contiguous, else a copy.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace tdpo
