// Element types of logits and gradients, and the step from a run-time dtype to a C++ type. No torch here.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define TDPO_HOST_DEVICE __host__ __device__
#else
#define TDPO_HOST_DEVICE
#endif

namespace tdpo {

enum class DType { f32, f64, bf16, f16 };

// Storage only: cpu/simd.h and cuda/device.h convert them to float and round back.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// What the kernels compute in: float64 for float64, float32 for everything else.
template <typename Scalar>
using RealOf = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

// Calls f with `flag` as a compile-time constant.
template <typename F>
TDPO_HOST_DEVICE void with_constant(bool flag, F f) {
  if (flag)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// Calls f with a value of the type that `dtype` stands for.
template <typename F>
void with_scalar(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f64:
      return f(double{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
  }
}

// Calls f(scalar, out) with the types of logits and of their gradient: the same, except that the gradient of float32
// logits may be rounded to 16 bits.
template <typename F>
void with_gradient_scalars(DType dtype, DType out_dtype, F f) {
  with_scalar(dtype, [&](auto scalar) {
    if constexpr (std::is_same_v<decltype(scalar), float>) {
      if (out_dtype == DType::bf16) return f(scalar, bf16{});
      if (out_dtype == DType::f16) return f(scalar, f16{});
    }
    f(scalar, scalar);
  });
}

}  // namespace tdpo
