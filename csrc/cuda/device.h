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
  // 1 / x within 1 unit in the last place; 1 / inf is 0.
  static __device__ __forceinline__ float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1 / x;
#endif
  }
};

// For entries that are taken to be finite. Where one is not, the sums come out infinite or NaN: see add_batch.
template <typename Scalar>
struct FiniteMath : DeviceMath<Scalar> {
  static TDPO_FN Scalar clamp_min(Scalar x, Scalar) { return x; }
  static TDPO_FN Scalar clamp_exponent(Scalar x) { return x; }
  static TDPO_FN bool has_mass(Scalar) { return true; }
};

// softcap * tanh(x / softcap), and its slope.
template <typename Real, bool kSoftcap>
struct Cap {
  static constexpr bool enabled = kSoftcap;
  Real softcap, inverse;
  Real exponent;  // 2 log2(e) / softcap: e^(2 x / softcap) in base 2
  explicit Cap(double softcap)
      : softcap(Real(softcap)), inverse(Real(1 / softcap)), exponent(Real(2 * kLog2e / softcap)) {}

  // In float32 the absolute error is at most 4e-7 softcap (2e-7 softcap for x > 0), and the relative error 3e-7 where
  // |x| < 0.6 softcap. There 1 - 2 / (e^2x + 1) would lose digits, and a minimax polynomial takes its place.
  __device__ __forceinline__ Real operator()(Real x) const {
    if constexpr (!kSoftcap) {
      return x;
    } else if constexpr (sizeof(Real) == 8) {
      return softcap * tanh(x * inverse);
    } else {
      const float u = x * inverse, u2 = u * u;
      float tail = u2 * 0.01561252f - 0.05221174f;
      tail = tail * u2 + 0.13313115f;
      tail = tail * u2 - 0.33332597f;
      const float near = x * u2 * tail + x;
      const float far =
          softcap - 2 * softcap * DeviceMath<float>::reciprocal(DeviceMath<float>::exp2(x * exponent) + 1);
      return fabs(u) < 0.6f ? near : far;
    }
  }
  // d(capped)/dx, from the capped value
  __device__ __forceinline__ Real slope(Real capped) const {
    const Real t = capped * inverse;
    return kSoftcap ? Real(1) - t * t : Real(1);
  }
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

template <bool kAligned, typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* data) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const Pack<T>*>(data);
  } else {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i) pack.entry[i] = data[i];
    return pack;
  }
}

// The entries of a pack as floats. A pair of bf16 takes one instruction an entry from its 32-bit word, two from 16-bit
// loads.
template <typename Real, typename T>
__device__ __forceinline__ void unpack(const Pack<T>& pack, Real (&entries)[Pack<T>::size]) {
  if constexpr (std::is_same_v<T, bf16>) {
    const auto* pairs = reinterpret_cast<const uint32_t*>(&pack);
#pragma unroll
    for (int i = 0; i < Pack<T>::size; i += 2) {
      entries[i] = __uint_as_float(pairs[i / 2] << 16);
      entries[i + 1] = __uint_as_float(pairs[i / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i) entries[i] = to_real(pack.entry[i]);
  }
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
