// The monoid at the heart of the library: what must be remembered of a row (one response token) over any slice of
// the vocabulary, so that slices can be merged in any grouping: SIMD lanes, threads, CTAs, chunks in time, ranks.
//
// z are the policy's and r the reference's logits, divided by the temperature. Exponentials are taken in base 2, so
// the maxima are too: Z = z log2(e), z_max = max Z. With e_z = 2^(Z - z_max), e_r = 2^(R - r_max) and the gap
// d = (z - r) - (z_max - r_max) log(2), a state holds
//
//   z_sum = sum e_z      gap     = sum e_r d                      z_dot = sum e_z (Z - z_max)
//   r_sum = sum e_r      bregman = sum (e_z - e_r - e_r d) >= 0
//
// and KL(q || p) = log1p(x) - x + bregman / r_sum, where x = (gap + bregman) / r_sum = z_sum / r_sum - 1. Every term
// of `bregman` is non-negative and, where d is small, is formed from d itself as e_r (exp(d) - 1 - d): nothing large
// is ever subtracted from something almost equal, so the KL keeps its digits when p is nearly q. The derivation is in
// docs/math.md. No torch here: host and device code include this file.
#pragma once

#include <cmath>
#include <limits>

#if defined(__CUDACC__)
#define TDPO_FN __host__ __device__ __forceinline__
#else
// always_inline: the header is compiled once per instruction set, and no copy of it may be shared between them.
#define TDPO_FN inline __attribute__((always_inline))
#endif

namespace tdpo {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// (exp(d) - 1 - d) / d for |d| < kSmallGap; the truncated series is off by 7e-7 relative at most in the float form.
constexpr float kSmallGap = 0.125f;
template <typename X>
TDPO_FN X exp_excess_over(X d) {
  X tail = d * (1.0f / 120) + (1.0f / 24);
  tail = tail * d + (1.0f / 6);
  tail = tail * d + 0.5f;
  return tail * d;
}
template <>
TDPO_FN double exp_excess_over(double d) {
  double term = d / 2, total = term;
  for (int n = 3; n < 15; ++n) total += term *= d / n;
  return total;
}

// 1 / temperature, as it scales natural and base-2 exponents.
template <typename Real>
struct Temper {
  Real natural, binary;
  explicit TDPO_FN Temper(double temperature) : natural(Real(1 / temperature)), binary(Real(kLog2e / temperature)) {}
};

// The scalar arithmetic of the element step; the SIMD and the device kernels bring their own.
template <typename Scalar>
struct ScalarMath {
  using Real = Scalar;
  using X = Scalar;
  // `exponent` makes of any x <= 0, -inf included, what `exp2` can take; exp2 of the floor is exactly 0.
  static constexpr Real kExponentFloor = sizeof(Real) == 8 ? -1100 : -200;
  static TDPO_FN X exp2(X x) { return std::exp2(x); }
  static TDPO_FN X abs(X x) { return std::fabs(x); }
  static TDPO_FN X at_least(X x, Real floor) { return x < floor ? floor : x; }  // NaN stays
  static TDPO_FN X exponent(X x) { return at_least(x, kExponentFloor); }
  // x * scale - shift, rounded once: the product of a large logit must not be rounded before the maximum leaves it.
  static TDPO_FN X scaled(X x, Real scale, Real shift) { return std::fma(x, scale, -shift); }
  template <typename Mask>
  static TDPO_FN X select(Mask mask, X yes, X no) {
    return mask ? yes : no;
  }
};

template <typename X>
struct RowSums {
  X z_sum, r_sum, gap, bregman, z_dot;

  TDPO_FN RowSums& operator+=(const RowSums& other) {
    z_sum += other.z_sum, r_sum += other.r_sum;
    gap += other.gap, bregman += other.bregman, z_dot += other.z_dot;
    return *this;
  }

  // Adds one entry (or one vector of entries) of raw logits; `z_shift` and `r_shift` stand for the maxima. The gap is
  // taken from z - r first: that difference is exact when the logits are close.
  template <typename Math>
  TDPO_FN void add(X z, X r, typename Math::Real z_shift, typename Math::Real r_shift,
                   Temper<typename Math::Real> temper) {
    using Real = typename Math::Real;
    const X z_log = Math::at_least(Math::scaled(z, temper.binary, z_shift), Math::kExponentFloor);  // finite, for z_dot
    const X r_log = Math::exponent(Math::scaled(r, temper.binary, r_shift));
    const X e_z = Math::exp2(z_log), e_r = Math::exp2(r_log);
    // An entry without reference mass has no gap, whatever its logits (-inf and underflow included).
    const auto has_mass = e_r != X{};
    const X d = Math::scaled(z - r, temper.natural, (z_shift - r_shift) * Real(kLn2));
    const X e_r_d = Math::select(has_mass, e_r * d, X{});
    const auto small = (Math::abs(d) < X{} + Real(kSmallGap)) & has_mass;
    z_sum += e_z;
    r_sum += e_r;
    gap += e_r_d;
    bregman += Math::select(small, e_r_d * exp_excess_over(d), e_z - e_r - e_r_d);
    z_dot += e_z * z_log;
  }
};

// The maxima are subtracted through this: a slice that is -inf throughout has no finite maximum and no mass to scale.
template <typename Real>
TDPO_FN Real shift_of(Real max) {
  return max == -std::numeric_limits<Real>::infinity() ? Real(0) : max;
}

// What happens to the sums when the maxima move up.
template <typename Real>
struct Rescale {
  Real z, r;        // factors of e_z and e_r
  Real z_hop, hop;  // change of Z - z_max (base 2), and of the gap (natural)
  Real growth;      // z - r, formed without cancellation
  Real excess;      // r * (exp(hop) - 1 - hop), likewise

  TDPO_FN Rescale(Real z_max, Real r_max, Real new_z_max, Real new_r_max) {
    const Real lowest = -std::numeric_limits<Real>::infinity();
    z_hop = z_max == lowest ? Real(0) : z_max - new_z_max;
    const Real r_hop = r_max == lowest ? Real(0) : r_max - new_r_max;
    hop = (z_hop - r_hop) * Real(kLn2);
    z = std::exp2(z_hop);
    r = std::exp2(r_hop);
    if (std::fabs(hop) < Real(kSmallGap)) {
      excess = r * hop * exp_excess_over(hop);
      growth = r * hop + excess;
    } else {
      excess = z - r - r * hop;
      growth = z - r;
    }
  }

  template <typename X>
  TDPO_FN void apply(RowSums<X>& sums) const {
    if (r == Real(0)) {  // the old reference mass is gone, and with it every gap, infinite ones too
      sums.bregman = sums.z_sum * z;
      sums.gap = X{};
    } else {
      sums.bregman = sums.bregman * z + sums.r_sum * excess + sums.gap * growth;
      sums.gap = (sums.gap + sums.r_sum * hop) * r;
    }
    sums.z_dot = (sums.z_dot + sums.z_sum * z_hop) * z;
    sums.z_sum *= z;
    sums.r_sum *= r;
  }
};

template <typename Real>
struct TokenValues {
  Real logp, ref_logp, kl, entropy;
  Real correct;  // 1 where no entry of the policy beats the label, else 0
};
constexpr int kTokenValues = 5;

template <typename Real>
struct RowState {
  Real z_max, r_max;
  RowSums<Real> sums;
  Real z_label, r_label;  // the label's raw logits; 0 where the slice does not hold the label

  static TDPO_FN RowState empty() {
    const Real lowest = -std::numeric_limits<Real>::infinity();
    return {lowest, lowest, {0, 0, 0, 0, 0}, 0, 0};
  }

  TDPO_FN void raise_maxima(Real new_z_max, Real new_r_max) {
    if (new_z_max == z_max && new_r_max == r_max) return;
    Rescale<Real>(z_max, r_max, new_z_max, new_r_max).apply(sums);
    z_max = new_z_max;
    r_max = new_r_max;
  }

  // One vocabulary entry.
  TDPO_FN void update(Real z, Real r, Temper<Real> temper) {
    const Real z_log = z * temper.binary, r_log = r * temper.binary;
    raise_maxima(z_log > z_max ? z_log : z_max, r_log > r_max ? r_log : r_max);
    sums.template add<ScalarMath<Real>>(z, r, shift_of(z_max), shift_of(r_max), temper);
  }

  // Associative, with empty() as the identity.
  TDPO_FN void merge(RowState other) {
    const Real z_top = other.z_max > z_max ? other.z_max : z_max;
    const Real r_top = other.r_max > r_max ? other.r_max : r_max;
    raise_maxima(z_top, r_top);
    other.raise_maxima(z_top, r_top);
    sums += other.sums;
    z_label += other.z_label;
    r_label += other.r_label;
  }

  // In double: once a row it costs nothing, and it spares the label's logit a rounding that the sums never saw.
  TDPO_FN TokenValues<Real> finalize(Temper<Real> temper) const {
    const double r_sum = sums.r_sum, x = (double(sums.gap) + double(sums.bregman)) / r_sum;
    double kl;
    if (std::fabs(x) < kSmallGap) {
      kl = sums.bregman / r_sum + log1p_minus(x);
      kl = kl < 0 ? 0 : kl;
    } else {
      kl = std::log(sums.z_sum / r_sum) - sums.gap / r_sum;
    }
    const double binary = temper.binary, log_z = std::log2(double(sums.z_sum)), log_r = std::log2(r_sum);
    return {Real((z_label * binary - shift_of(z_max) - log_z) * kLn2),
            Real((r_label * binary - shift_of(r_max) - log_r) * kLn2), Real(kl),
            Real((log_z - sums.z_dot / double(sums.z_sum)) * kLn2), Real(z_label * temper.binary >= z_max)};
  }

 private:
  // log1p(x) - x for |x| < 1/4: with s = x / (2 + x), log1p(x) = 2 atanh(s) = 2s + 2s^3/3 + ..., and 2s - x = -x s.
  static TDPO_FN double log1p_minus(double x) {
    const double s = x / (2 + x), s2 = s * s;
    double odd = 0;
    for (int n = 17; n >= 3; n -= 2) odd = odd * s2 + 2.0 / n;
    return odd * s2 * s - x * s;
  }
};

constexpr int kRowStateSize = 9;
static_assert(sizeof(RowState<float>) == kRowStateSize * sizeof(float), "a state is stored as plain numbers");

// dL/dlogits of one row: p_scale 2^(Z - z_shift) - q_scale 2^(R - r_shift), and `label_extra` more at the label;
// `logp_grad` and `kl_grad` are dL/dlogp and dL/dkl.
template <typename Real>
struct RowGradient {
  Temper<Real> temper;
  Real z_shift, r_shift, p_scale, q_scale, label_extra;

  TDPO_FN RowGradient(const RowState<Real>& state, Real logp_grad, Real kl_grad, Temper<Real> row_temper)
      : temper(row_temper),
        z_shift(shift_of(state.z_max)),
        r_shift(shift_of(state.r_max)),
        p_scale((kl_grad - logp_grad) * temper.natural / state.sums.z_sum),
        q_scale(kl_grad == Real(0) ? Real(0) : kl_grad * temper.natural / state.sums.r_sum),
        label_extra(logp_grad * temper.natural) {}

  template <typename Math>
  TDPO_FN typename Math::X policy_part(typename Math::X z) const {
    return Math::exp2(Math::exponent(Math::scaled(z, temper.binary, z_shift))) * p_scale;
  }
  template <typename Math>
  TDPO_FN typename Math::X reference_part(typename Math::X r) const {
    return Math::exp2(Math::exponent(Math::scaled(r, temper.binary, r_shift))) * q_scale;
  }
};

}  // namespace tdpo
