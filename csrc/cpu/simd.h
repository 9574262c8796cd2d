// SIMD for the row kernels, on the compiler's vector extensions: one source for every instruction set, with the vector
// width set by the flags of the translation unit. Float lanes only: float64 is for tests and uses ScalarMath.
#pragma once

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../dtype.h"
#include "../row_state.h"

#if !defined(TDPO_CPU_ISA)
#error "TDPO_CPU_ISA must name the instruction set; CMakeLists.txt defines it"
#endif

#define TDPO_INLINE_LAMBDA __attribute__((always_inline))

namespace tdpo::TDPO_CPU_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;

typedef float Floats __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));
typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));

template <typename V, typename T>
TDPO_FN V load_bits(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

// The larger of two: `b` where `a` is NaN, NaN where `b` is NaN.
TDPO_FN Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
TDPO_FN double maximum(double a, double b) { return a > b ? a : b; }

struct SimdMath {
  using Real = float;
  using X = Floats;

  template <typename Mask>
  static TDPO_FN X select(Mask mask, X yes, X no) {
    return mask ? yes : no;
  }
  static TDPO_FN X abs(X x) { return (X)((Ints)x & 0x7fffffff); }

  static constexpr Real kExponentFloor = -200;
  static TDPO_FN X clamp_min(X x, Real floor) { return maximum(X{} + floor, x); }  // propagates NaN

  static TDPO_FN auto has_mass(X e_r) { return e_r != X{}; }

  // With a single rounding (ScalarMath says why). Intrinsics, because compilers contract a product and a difference
  // only where they happen to optimise them together.
  static TDPO_FN X scaled(X x, Real scale, Real shift) {
#if defined(__AVX512F__)
    return (X)_mm512_fmsub_ps((__m512)x, _mm512_set1_ps(scale), _mm512_set1_ps(shift));
#elif defined(__FMA__)
    return (X)_mm256_fmsub_ps((__m256)x, _mm256_set1_ps(scale), _mm256_set1_ps(shift));
#elif defined(__x86_64__)
    typedef double Doubles __attribute__((vector_size(2 * kBytes)));
    return __builtin_convertvector(__builtin_convertvector(x, Doubles) * double(scale) - double(shift), X);
#elif defined(__aarch64__)
    return (X)vfmaq_f32(vdupq_n_f32(-shift), (float32x4_t)x, vdupq_n_f32(scale));
#else
    return x * scale - shift;
#endif
  }

  static TDPO_FN X clamp_exponent(X x) {
#if defined(__AVX512F__)
    return x;  // scalef by 2^-inf gives 0
#else
    return clamp_min(x, kExponentFloor);
#endif
  }

  // 2^x for x < 128, within 2 units in the last place; 0 below float's range; propagates NaN. 2^x = 2^n 2^f with
  // |f| <= 1/2; the polynomial for 2^f is a minimax fit, exact at 0, with relative error 1.1e-7.
  static TDPO_FN X exp2(X x) {
#if defined(__AVX512F__)
    const X n = (X)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    // Adding 1.5 * 2^23 + 127 leaves n + 127 in the low bits, ready to be shifted into the exponent field.
    const X shifted = x + (12582912.0f + 127.0f);
    const X n = shifted - (12582912.0f + 127.0f);
#endif
    const X f = x - n;
    X poly = f * 0.0013264724f + 0.0096715130f;
    poly = poly * f + 0.055507336f;
    poly = poly * f + 0.24022242f;
    poly = poly * f + 0.6931470f;
    poly = poly * f + 1.0f;
#if defined(__AVX512F__)
    return (X)_mm512_scalef_ps((__m512)poly, (__m512)n);
#else
    return select(x < X{} - 126.0f, X{}, poly * (X)((Ints)shifted << 23));
#endif
  }
};

// tanh for softcapped logits: an odd series near 0, where 1 - 2 / (exp(2|x|) + 1) would lose digits.
template <typename Math>
TDPO_FN typename Math::X tanh_of(typename Math::X x) {
  using X = typename Math::X;
  using Real = typename Math::Real;
  const X size = Math::abs(x), x2 = x * x;
  X series = x2 * Real(-1382.0 / 155925) + Real(62.0 / 2835);
  series = series * x2 - Real(17.0 / 315);
  series = series * x2 + Real(2.0 / 15);
  series = series * x2 - Real(1.0 / 3);
  series = series * x2 * x + x;
  const X decay = Math::exp2(Math::clamp_min(size * Real(-2 * kLog2e), Math::kExponentFloor));
  const X large = (X{} + Real(1) - decay) / (X{} + Real(1) + decay);
  return Math::select(size < X{} + Real(0.25), series, Math::select(x < X{}, X{} - large, large));
}
template <>
TDPO_FN double tanh_of<ScalarMath<double>>(double x) {
  return std::tanh(x);
}

// Loads and stores: `Vector<Math, Scalar>` converts between Math's registers and arrays of Scalar.
template <typename Math, typename Scalar>
struct Vector;

template <>
struct Vector<ScalarMath<double>, double> {
  static constexpr int lanes = 1;
  static TDPO_FN double load(const double* p) { return *p; }
  static TDPO_FN void store(double* p, double x, bool) { *p = x; }
};

template <>
struct Vector<SimdMath, float> {
  static constexpr int lanes = kLanes;
  static TDPO_FN Floats load(const float* p) { return load_bits<Floats>(p); }
  // A streaming (non-temporal) store needs an aligned address; it avoids reading a cache line that is about to be
  // overwritten completely.
  static TDPO_FN void store(float* p, Floats x, bool streaming) {
#if defined(__AVX512F__)
    if (streaming) return _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
    if (streaming) return _mm256_stream_ps(p, (__m256)x);
#else
    (void)streaming;
#endif
    std::memcpy(p, &x, sizeof(x));
  }
};

// Orders streaming stores before whatever other threads do next; nothing else does.
TDPO_FN void store_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

TDPO_FN void store_halves(void* p, Halves x, bool streaming) {
#if defined(__AVX512F__)
  if (streaming) return _mm256_stream_si256((__m256i*)p, (__m256i)x);
#elif defined(__AVX2__)
  if (streaming) return _mm_stream_si128((__m128i*)p, (__m128i)x);
#else
  (void)streaming;
#endif
  std::memcpy(p, &x, sizeof(x));
}

template <>
struct Vector<SimdMath, bf16> {
  static constexpr int lanes = kLanes;
  static TDPO_FN Floats load(const bf16* p) {
    return (Floats)(__builtin_convertvector(load_bits<Halves>(p), Words) << 16);
  }
  // Rounds to nearest even. NaN becomes the quiet NaN: rounding its payload could give infinity.
  static TDPO_FN void store(bf16* p, Floats x, bool streaming) {
    const Words bits = (Words)x;
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words kept = x == x ? rounded : Words{} + 0x7fc0u;
    store_halves(p, __builtin_convertvector(kept, Halves), streaming);
  }
};

template <>
struct Vector<SimdMath, f16> {
  static constexpr int lanes = kLanes;
#if defined(__AVX512F__)
  static TDPO_FN Floats load(const f16* p) { return (Floats)_mm512_cvtph_ps(load_bits<__m256i>(p)); }
  static TDPO_FN void store(f16* p, Floats x, bool streaming) {
    store_halves(p, (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT), streaming);
  }
#elif defined(__AVX2__)
  static TDPO_FN Floats load(const f16* p) { return (Floats)_mm256_cvtph_ps(load_bits<__m128i>(p)); }
  static TDPO_FN void store(f16* p, Floats x, bool streaming) {
    store_halves(p, (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT), streaming);
  }
#elif defined(__aarch64__)
  static TDPO_FN Floats load(const f16* p) { return (Floats)vcvt_f32_f16(load_bits<float16x4_t>(p)); }
  static TDPO_FN void store(f16* p, Floats x, bool streaming) {
    store_halves(p, (Halves)vcvt_f16_f32((float32x4_t)x), streaming);
  }
#else
  static TDPO_FN Floats load(const f16* p) {
    Floats x{};
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t half = p[i].bits, sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
      // Multiplying by 2^112 corrects the exponent's bias; it is exact, for subnormal numbers too.
      const uint32_t shifted = magnitude << 13;
      float value;
      std::memcpy(&value, &shifted, 4);
      value = magnitude >= 0x7c00u ? (magnitude > 0x7c00u ? __builtin_nanf("") : __builtin_inff()) : value * 0x1p112f;
      x[i] = sign ? -value : value;
    }
    return x;
  }
  static TDPO_FN void store(f16* p, Floats x, bool) {
    for (int i = 0; i < kLanes; ++i) p[i].bits = round_to_half(x[i]);
  }
  static TDPO_FN uint16_t round_to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = (bits >> 16) & 0x8000u;
    const float size = std::fabs(value);
    if (!(size == size)) return sign | 0x7e00u;
    if (size >= 65520.0f) return sign | 0x7c00u;
    if (size < 0x1p-14f) return sign | (uint16_t)std::nearbyint(size * 0x1p24f);
    bits &= 0x7fffffffu;
    return sign | (uint16_t)((bits + 0xfffu + ((bits >> 13) & 1u) - (112u << 23)) >> 13);
  }
#endif
};

}  // namespace tdpo::TDPO_CPU_ISA
