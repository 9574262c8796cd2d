// What device code needs of its platform: CUDA, or the CPU emulator of tests/cpp (which defines TDPO_EMULATOR).
#pragma once

#include "../problem.h"
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

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

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
  // The special-function unit's 2^x: 2 units in the last place; results below 2^-126 are 0.
  static __device__ __forceinline__ float exp2(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return std::exp2(x);
#endif
  }
};

// 16 bytes of a row.
template <typename T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T entry[size];
};
template <typename T, int count>
struct alignas(count * sizeof(T)) Entries {
  T entry[count];
};

}  // namespace tdpo::cuda
