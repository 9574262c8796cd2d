// The state of a row (one response token) over any slice of the vocabulary. States form a monoid: slices may be merged
// in any grouping, whether they are SIMD lanes, threads, CTAs, chunks in time or ranks.
//
// z are the policy's and r the reference's logits, divided by the temperature. Exponentials are taken in base 2, so
// the maxima and gaps are too: Z = z log2(e), z_max = max Z. With e_z = 2^(Z - z_max), e_r = 2^(R - r_max) and the gap
// d = (Z - R) - (z_max - r_max), a state holds
//
//   z_sum = sum e_z      gap     = sum e_r d                      z_dot = sum e_z (Z - z_max)
//   r_sum = sum e_r      bregman = sum (e_z - e_r - e_r d log(2)) >= 0
//
// and KL(q || p) = log1p(x) - x + bregman / r_sum, where x = (gap log(2) + bregman) / r_sum = z_sum / r_sum - 1. Every
// term of `bregman` is non-negative and, where d is small, is formed from d itself as e_r (2^d - 1 - d log(2)): nothing
// large is ever subtracted from something almost equal, so the KL keeps its digits when p is nearly q. For the reverse
// KL(p || q), z and r exchange their roles in d, `gap` and `bregman`, and there only. The derivation is in
// docs/math.md. No torch here: host and device code include this file.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define TDPO_FN __host__ __device__ __forceinline__
#else
// always_inline: the header is compiled once per instruction set, and no copy of it may be shared between them.
#define TDPO_FN inline __attribute__((always_inline))
#endif

namespace tdpo {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// (2^d - 1 - d log(2)) / d for |d| < kSmallGap. The float series is truncated: relative error at most 7e-7.
constexpr float kSmallGap = 0.18f;
template <typename X>
TDPO_FN X exp2_excess_over(X d) {
  X tail = d * 0.0013333558f + 0.009618129f;  // log(2)^n / n! for n = 5, 4, 3, 2
  tail = tail * d + 0.055504109f;
  tail = tail * d + 0.24022651f;
  return tail * d;
}
template <>
TDPO_FN double exp2_excess_over(double d) {
  double term = d * kLn2 * kLn2 / 2, total = term;
  for (int n = 3; n < 15; ++n) total += term *= d * kLn2 / n;
  return total;
}

// 1 / temperature: the scale of natural and of base-2 exponents.
template <typename Real>
struct InvTemperature {
  Real natural, base2;
  explicit TDPO_FN InvTemperature(double temperature)
      : natural(Real(1 / temperature)), base2(Real(kLog2e / temperature)) {}
};

// Scalar arithmetic for RowSums and RowGradient; cpu/simd.h and cuda/device.h have their own versions.
template <typename Scalar>
struct ScalarMath {
  using Real = Scalar;
  using X = Scalar;
  // exp2 of the floor is exactly 0.
  static constexpr Real kExponentFloor = sizeof(Real) == 8 ? -1100 : -200;
  static TDPO_FN X exp2(X x) { return std::exp2(x); }
  static TDPO_FN X abs(X x) { return std::fabs(x); }
  static TDPO_FN X clamp_min(X x, Real floor) { return x < floor ? floor : x; }  // propagates NaN
  // Brings any x <= 0, -inf included, into the range that this class's exp2 accepts.
  static TDPO_FN X clamp_exponent(X x) { return clamp_min(x, kExponentFloor); }
  // Whether an entry has reference mass. A class for entries that are known to be finite need not look.
  static TDPO_FN bool has_mass(X e_r) { return e_r != X{}; }
  // x * scale - shift with a single rounding: for a large logit, rounding the product before subtracting the maximum
  // would lose the digits of the difference.
  static TDPO_FN X scaled(X x, Real scale, Real shift) { return std::fma(x, scale, -shift); }
  template <typename Mask>
  static TDPO_FN X select(Mask mask, X yes, X no) {
    return mask ? yes : no;
  }
};

// The maximum to subtract from exponents: 0 for a slice that is -inf throughout, where -inf - (-inf) would give NaN.
template <typename Real>
TDPO_FN Real finite_max(Real max) {
  return max == -std::numeric_limits<Real>::infinity() ? Real(0) : max;
}

// What is subtracted from the entries of a row. The gap of an entry starts from z - r: that difference is exact when
// the logits are close. Where one model's logits have a large offset against the other's, the offset is taken off
// first, which is exact too: z - r would keep only the digits that the offset leaves.
template <typename Real>
struct Shifts {
  Real z, r;                // from the exponents: the finite maxima
  Real z_center, r_center;  // from the logits, before their difference is formed
  Real gap;                 // from (z - z_center) - (r - r_center), as an exponent

  TDPO_FN Shifts(Real z_max, Real r_max, InvTemperature<Real> inv_temp)
      : z(finite_max(z_max)), r(finite_max(r_max)), z_center(0), r_center(0), gap(z - r) {
    if (!far_apart()) return;
    // A multiple of what the largest logits are rounded to, so that taking it off is exact.
    const Real largest = std::fmax(std::fabs(z), std::fabs(r)) / inv_temp.base2;
    const Real rounding = std::copysign(largest, gap);
    const Real offset = (gap / inv_temp.base2 + rounding) - rounding;
    if (std::fabs(z) > std::fabs(r))
      z_center = offset;
    else
      r_center = -offset;
    gap = Real(double(z) - double(r) - double(offset) * double(inv_temp.base2));
  }
  // Nearer maxima leave z - r as many digits as a log-sum-exp has. There the centers are 0.
  TDPO_FN bool far_apart() const { return std::fabs(z - r) > Real(16); }
};

// The sums of a state. The KL is weighted by one of the rows: by r or, where it is reversed, by z.
template <typename X, bool kReverse>
struct RowSums {
  X z_sum, r_sum, gap, bregman, z_dot;

  TDPO_FN X weight_sum() const { return kReverse ? z_sum : r_sum; }
  TDPO_FN X other_sum() const { return kReverse ? r_sum : z_sum; }

  TDPO_FN RowSums& operator+=(const RowSums& other) {
    z_sum += other.z_sum, r_sum += other.r_sum;
    gap += other.gap, bregman += other.bregman, z_dot += other.z_dot;
    return *this;
  }

  // The gap of an entry, in base 2. Without kCentered, the shifts must not be far apart.
  template <typename Math, bool kCentered>
  static TDPO_FN X gap_of(X z, X r, const Shifts<typename Math::Real>& shifts,
                          InvTemperature<typename Math::Real> inv_temp) {
    if constexpr (kCentered) z = z - shifts.z_center, r = r - shifts.r_center;
    if constexpr (kReverse) return Math::scaled(r - z, inv_temp.base2, -shifts.gap);
    return Math::scaled(z - r, inv_temp.base2, shifts.gap);
  }

  // Adds one entry (or one vector of entries) of logits before the temperature.
  template <typename Math, bool kCentered>
  TDPO_FN void add(X z, X r, const Shifts<typename Math::Real>& shifts, InvTemperature<typename Math::Real> inv_temp) {
    using Real = typename Math::Real;
    const X z_log =
        Math::clamp_min(Math::scaled(z, inv_temp.base2, shifts.z), Math::kExponentFloor);  // finite for z_dot
    const X r_log = Math::clamp_exponent(Math::scaled(r, inv_temp.base2, shifts.r));
    const X e_z = Math::exp2(z_log), e_r = Math::exp2(r_log);
    const X weight = kReverse ? e_z : e_r, other = kReverse ? e_r : e_z;
    // An entry without weight has no gap, whatever its logits (-inf and underflow included).
    const auto has_mass = Math::has_mass(weight);
    const X d = gap_of<Math, kCentered>(z, r, shifts, inv_temp);
    const X weighted_d = Math::select(has_mass, weight * d, X{});
    const auto small = (Math::abs(d) < X{} + Real(kSmallGap)) & has_mass;
    z_sum += e_z;
    r_sum += e_r;
    gap += weighted_d;
    bregman += Math::select(small, weighted_d * exp2_excess_over(d), other - weight - weighted_d * Real(kLn2));
    z_dot += e_z * z_log;
  }
};

// Beyond this base-2 exponent (logits of 7e8 in float) a rounding of the maximum is a large power of two. What is far
// below counts as without mass, as masks of -1e30 do; a row whose maximum is beyond is refused.
template <typename Real>
constexpr Real kLargestExponent = sizeof(Real) == 8 ? Real(int64_t(1) << 59) : Real(1 << 30);

// The running maximum of exponents, with a candidate for it; NaN candidates are passed over.
template <typename Real>
TDPO_FN Real running_max(Real max, Real candidate) {
  const Real top = candidate > max ? candidate : max;
  const bool masked = top < -kLargestExponent<Real> && top != -std::numeric_limits<Real>::infinity();
  return masked ? -kLargestExponent<Real> : top;
}

// Rescales the sums of a state to larger maxima.
template <typename Real, bool kReverse>
struct Rescale {
  Real z, r;           // factors of e_z and e_r
  Real weight, other;  // the same two, by their roles in the KL
  Real z_hop, hop;     // changes of Z - z_max and of the gap d
  Real growth;         // other - weight, formed without cancellation
  Real excess;         // weight * (2^hop - 1 - hop log(2)), also without cancellation

  TDPO_FN Rescale(Real z_max, Real r_max, Real new_z_max, Real new_r_max) {
    const Real lowest = -std::numeric_limits<Real>::infinity();
    z_hop = z_max == lowest ? Real(0) : z_max - new_z_max;
    const Real r_hop = r_max == lowest ? Real(0) : r_max - new_r_max;
    hop = kReverse ? r_hop - z_hop : z_hop - r_hop;
    z = std::exp2(z_hop);
    r = std::exp2(r_hop);
    weight = kReverse ? z : r;
    other = kReverse ? r : z;
    if (std::fabs(hop) < Real(kSmallGap)) {
      excess = weight * hop * exp2_excess_over(hop);
      growth = weight * hop * Real(kLn2) + excess;
    } else {
      excess = other - weight - weight * hop * Real(kLn2);
      growth = other - weight;
    }
  }

  // `bregman` is moved term by term or, since bregman = z_sum - r_sum - gap log(2) (forward), formed anew: whichever
  // sums smaller numbers and so rounds less. The first is right where the maxima rise almost alike, the second where
  // one rises alone.
  template <typename X>
  TDPO_FN void apply(RowSums<X, kReverse>& sums) const {
    if (weight == Real(0)) {  // no weight is left, so there is no gap either, not even an infinite one
      sums.bregman = sums.other_sum() * other;
      sums.gap = X{};
    } else {
      const X gap = (sums.gap + sums.weight_sum() * hop) * weight;
      const X other_sum = sums.other_sum() * other, weight_sum = sums.weight_sum() * weight;
      const X natural_gap = gap * Real(kLn2), from_gap = sums.gap * Real(kLn2) * growth;
      const X scaled = sums.bregman * other, from_mass = sums.weight_sum() * excess;
      const X moved_size = size_of(scaled) + size_of(from_mass) + size_of(from_gap);
      const auto moves = moved_size <= other_sum + weight_sum + size_of(natural_gap);
      sums.bregman = moves ? scaled + from_mass + from_gap : other_sum - weight_sum - natural_gap;
      sums.gap = gap;
    }
    sums.z_dot = (sums.z_dot + sums.z_sum * z_hop) * z;
    sums.z_sum *= z;
    sums.r_sum *= r;
  }

 private:
  template <typename X>
  static TDPO_FN X size_of(X x) {
    return x < X{} ? -x : x;
  }
};

constexpr int kTokenValues = 6;

// The values of one row; all zeros for an ignored row. The operators return these fields in this order.
template <typename Real>
struct TokenValues {
  Real logp, ref_logp, kl, entropy;
  Real correct;  // 1 where no policy logit exceeds the label's, else 0
  Real tokens;   // 1: a sum over rows counts those that are not ignored

  // Writes column `row` of (kTokenValues, rows).
  TDPO_FN void store(Real* columns, int64_t rows, int64_t row) const {
    static_assert(sizeof(TokenValues) == kTokenValues * sizeof(Real), "the fields are read as an array");
    const Real* const fields = reinterpret_cast<const Real*>(this);
    for (int field = 0; field < kTokenValues; ++field) columns[field * rows + row] = fields[field];
  }
};

template <typename Real, bool kReverse = false>
struct RowState {
  Real z_max, r_max;
  RowSums<Real, kReverse> sums;
  Real z_label, r_label;  // the label's logits before the temperature; 0 where the label is in another slice

  static TDPO_FN RowState empty() {
    const Real lowest = -std::numeric_limits<Real>::infinity();
    return {lowest, lowest, {0, 0, 0, 0, 0}, 0, 0};
  }

  TDPO_FN void raise_maxima(Real new_z_max, Real new_r_max) {
    if (new_z_max == z_max && new_r_max == r_max) return;
    Rescale<Real, kReverse>(z_max, r_max, new_z_max, new_r_max).apply(sums);
    z_max = new_z_max;
    r_max = new_r_max;
  }

  // Adds one vocabulary entry.
  TDPO_FN void update(Real z, Real r, InvTemperature<Real> inv_temp) {
    const Real z_log = z * inv_temp.base2, r_log = r * inv_temp.base2;
    raise_maxima(running_max(z_max, z_log), running_max(r_max, r_log));
    sums.template add<ScalarMath<Real>, true>(z, r, Shifts<Real>(z_max, r_max, inv_temp), inv_temp);
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

  // Whether the row's largest logit is too far from 0 for its exponents; not for a row that is -inf throughout.
  TDPO_FN bool is_out_of_range() const {
    const Real lowest = -std::numeric_limits<Real>::infinity();
    const auto beyond = [=](Real max) { return std::fabs(max) >= kLargestExponent<Real> && max != lowest; };
    return beyond(z_max) || beyond(r_max);
  }

  // In double: once per row it costs nothing, and it avoids a rounding of the label's scaled logit that the sums do not
  // have.
  TDPO_FN TokenValues<Real> finalize(InvTemperature<Real> inv_temp) const {
    const double weight = sums.weight_sum(), gap = sums.gap * kLn2, x = (gap + double(sums.bregman)) / weight;
    double kl;
    if (std::fabs(x) < kSmallGap) {
      kl = sums.bregman / weight + log1p_minus(x);
      kl = kl < 0 ? 0 : kl;
    } else {
      kl = std::log(sums.other_sum() / weight) - gap / weight;
    }
    const double base2 = inv_temp.base2, log_z = std::log2(double(sums.z_sum)), log_r = std::log2(double(sums.r_sum));
    return {Real((z_label * base2 - finite_max(z_max) - log_z) * kLn2),
            Real((r_label * base2 - finite_max(r_max) - log_r) * kLn2),
            Real(kl),
            Real((log_z - sums.z_dot / double(sums.z_sum)) * kLn2),
            Real(z_label * inv_temp.base2 >= z_max),
            Real(1)};
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
static_assert(sizeof(RowState<float>) == kRowStateSize * sizeof(float), "states are stored as arrays of numbers");

// dL/dlogits of one row, but for `label_extra`, which is added at the label, and the slope of a softcap. `logps_grad`
// and `kl_grad` are dL/dlogp and dL/dkl. With a and k for these, p and q as above, and the mean gap m = sum p d:
//
//   forward: (k - a) p - k q        reverse: p (k log(2) (m - d) - a)
template <typename Real, bool kReverse>
struct RowGradient {
  InvTemperature<Real> inv_temp;
  Shifts<Real> shifts;
  Real p_scale;      // of e_z
  Real kl_scale;     // of e_r or, reverse, of e_z (m - d)
  Real mean_gap;     // m; 0 for the forward KL
  Real label_extra;  // a

  TDPO_FN RowGradient(const RowState<Real, kReverse>& state, Real logps_grad, Real kl_grad,
                      InvTemperature<Real> inv_temp)
      : inv_temp(inv_temp),
        shifts(state.z_max, state.r_max, inv_temp),
        p_scale(((kReverse ? Real(0) : kl_grad) - logps_grad) * inv_temp.natural / state.sums.z_sum),
        kl_scale(kl_grad == Real(0)
                     ? Real(0)
                     : kl_grad * Real(kReverse ? kLn2 : -1) * inv_temp.natural / state.sums.weight_sum()),
        mean_gap(kReverse ? state.sums.gap / state.sums.weight_sum() : Real(0)),
        label_extra(logps_grad * inv_temp.natural) {}

  // Of one entry, or one vector of entries; `r` is not read without kReference, for rows whose KL has no gradient.
  template <typename Math, bool kReference>
  TDPO_FN typename Math::X at(typename Math::X z, typename Math::X r) const {
    using X = typename Math::X;
    const X e_z = Math::exp2(Math::clamp_exponent(Math::scaled(z, inv_temp.base2, shifts.z)));
    if constexpr (!kReference) {
      return e_z * p_scale;
    } else if constexpr (kReverse) {
      const X d = RowSums<X, true>::template gap_of<Math, true>(z, r, shifts, inv_temp);
      return Math::select(Math::has_mass(e_z), e_z * ((X{} + mean_gap - d) * kl_scale + p_scale), X{});
    } else {
      const X e_r = Math::exp2(Math::clamp_exponent(Math::scaled(r, inv_temp.base2, shifts.r)));
      return e_z * p_scale + e_r * kl_scale;
    }
  }
};

}  // namespace tdpo
