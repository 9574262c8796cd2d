// Device-side primitives: conversions, vector loads, fast exp2. The platform is CUDA, or the CPU emulator of tests/cpp
// (which defines TDPO_EMULATOR).
#pragma once

#include "../params.h"
#include "../row_state.h"

#if defined(TDPO_EMULATOR)
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#define TDPO_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace tdpo::cuda {

constexpr int kWarp = 32;

TDPO_FN float to_real(float x) { return x; }
TDPO_FN double to_real(double x) { return x; }
__device__ __forceinline__ float to_real(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float to_real(f16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <typename T>
struct Rounded;
template <>
struct Rounded<float> {
  static __device__ __forceinline__ float of(float x) { return x; }
};
template <>
struct Rounded<double> {
  static __device__ __forceinline__ double of(double x) { return x; }
};
template <>
struct Rounded<bf16> {
  static __device__ __forceinline__ bf16 of(float x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }
};
template <>
struct Rounded<f16> {
  static __device__ __forceinline__ f16 of(float x) { return {__half_as_ushort(__float2half_rn(x))}; }
};

template <typename Scalar>
struct DeviceMath : ScalarMath<Scalar> {};

template <>
struct DeviceMath<float> : ScalarMath<float> {
  // The special-function unit's 2^x, within 2 units in the last place; results below 2^-126, 2^-inf included, are 0.
  static __device__ __forceinline__ float exp2(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return std::exp2(x);
#endif
  }
  static __device__ __forceinline__ float clamp_exponent(float x) { return x; }
};

// 16 bytes of a row.
template <typename T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T entry[size];
};
// `count` entries of any type, stored with one instruction.
template <typename T, int count>
struct alignas(count * sizeof(T)) Entries {
  T entry[count];
};

// Whether `data` may be read or written `bytes` (a power of two) at a time.
__device__ __forceinline__ bool is_aligned(const void* data, int bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* data, bool aligned) {
  if (aligned) return *reinterpret_cast<const Pack<T>*>(data);
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i) pack.entry[i] = data[i];
  return pack;
}

// The elementwise maximum of two pairs of 16-bit numbers; NaN only where both are NaN.
template <typename T>
__device__ __forceinline__ uint32_t max_pair(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t top;
  if constexpr (std::is_same_v<T, bf16>)
    asm("max.bf16x2 %0, %1, %2;" : "=r"(top) : "r"(a), "r"(b));
  else
    asm("max.f16x2 %0, %1, %2;" : "=r"(top) : "r"(a), "r"(b));
  return top;
#else
  const auto max = [](uint32_t x, uint32_t y) {
    const float real_x = to_real(T{uint16_t(x)}), real_y = to_real(T{uint16_t(y)});
    return real_x > real_y || real_y != real_y ? x & 0xffffu : y & 0xffffu;
  };
  return max(a, b) | max(a >> 16, b >> 16) << 16;
#endif
}

// The largest entry of a pack.
template <typename T>
__device__ __forceinline__ auto max_of(const Pack<T>& pack) {
  if constexpr (sizeof(T) == 2) {
    const auto* pairs = reinterpret_cast<const uint32_t*>(&pack);
    const uint32_t top = max_pair<T>(max_pair<T>(pairs[0], pairs[1]), max_pair<T>(pairs[2], pairs[3]));
    return fmax(to_real(T{uint16_t(top)}), to_real(T{uint16_t(top >> 16)}));
  } else {
    auto top = to_real(pack.entry[0]);
#pragma unroll
    for (int i = 1; i < Pack<T>::size; ++i) top = fmax(top, to_real(pack.entry[i]));
    return top;
  }
}

}  // namespace tdpo::cuda
