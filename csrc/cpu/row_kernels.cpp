// The CPU kernels. Compiled once per instruction set (CMakeLists.txt), each copy in a namespace of its own.
//
// A row is read in blocks that fit the first-level cache: once for the maxima, once for the sums, so that memory is
// read once, exponentials are taken once per logit, and the sums are rescaled only when a block raises a maximum.
// Each block sums into registers of its own, 128 entries a lane, which keeps rounding from growing with the vocabulary.
#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace tdpo::TDPO_CPU_ISA {
namespace {

constexpr int64_t kBlock = 128 * kLanes;

template <typename Math, typename Scalar, bool kSoftcap>
struct Row {
  using X = typename Math::X;
  using Real = typename Math::Real;
  using V = Vector<Math, Scalar>;
  static constexpr int lanes = V::lanes;

  const Scalar* data;
  Real softcap;

  Row(const Rows& rows, int64_t row, const Problem& problem)
      : data(static_cast<const Scalar*>(rows.data) + rows.offset(row)), softcap(Real(problem.softcap)) {}

  TDPO_FN X capped(X x) const {
    if constexpr (kSoftcap) return tanh_of<Math>(x * (Real(1) / softcap)) * softcap;
    return x;
  }
  TDPO_FN X at(int64_t v) const { return capped(V::load(data + v)); }

  // The last few entries, padded with -inf, which adds nothing to any sum.
  TDPO_FN X tail(int64_t v, int64_t count) const {
    Scalar padded[lanes];
    std::memcpy(padded, data + v, count * sizeof(Scalar));
    X x = capped(V::load(padded));
    Real* entries = reinterpret_cast<Real*>(&x);
    for (int64_t i = count; i < lanes; ++i) entries[i] = -std::numeric_limits<Real>::infinity();
    return x;
  }
  TDPO_FN Real one(int64_t v) const {
    const X x = tail(v, 1);
    return *reinterpret_cast<const Real*>(&x);
  }
};

template <typename Real, typename X>
TDPO_FN Real horizontal_max(X x) {
  const Real* entries = reinterpret_cast<const Real*>(&x);
  Real top = entries[0];
  for (size_t i = 1; i < sizeof(X) / sizeof(Real); ++i) top = entries[i] > top ? entries[i] : top;
  return top;
}
template <typename Real, typename X>
TDPO_FN Real horizontal_sum(X x) {
  Real* entries = reinterpret_cast<Real*>(&x);
  for (size_t half = sizeof(X) / sizeof(Real) / 2; half > 0; half /= 2)
    for (size_t i = 0; i < half; ++i) entries[i] += entries[i + half];
  return entries[0];
}

template <typename Math, typename Scalar, bool kSoftcap>
void row_state_of(const Problem& problem, int64_t row, int64_t begin, int64_t end, void* out) {
  using X = typename Math::X;
  using Real = typename Math::Real;
  constexpr int lanes = Vector<Math, Scalar>::lanes;
  const Row<Math, Scalar, kSoftcap> z_row(problem.logits, row, problem), r_row(problem.ref_logits, row, problem);
  const Temper<Real> temper(problem.temperature);
  const Real lowest = -std::numeric_limits<Real>::infinity();

  auto state = RowState<Real>::empty();
  RowSums<X> total{};
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = block + kBlock < end ? block + kBlock : end;
    const int64_t whole = block + (stop - block) / lanes * lanes;

    X z_top = X{} + lowest, r_top = X{} + lowest;
    for (int64_t v = block; v < whole; v += lanes) {
      z_top = maximum(z_row.at(v), z_top);
      r_top = maximum(r_row.at(v), r_top);
    }
    if (whole < stop) {
      z_top = maximum(z_row.tail(whole, stop - whole), z_top);
      r_top = maximum(r_row.tail(whole, stop - whole), r_top);
    }
    const Real z_max = horizontal_max<Real>(z_top) * temper.binary;
    const Real r_max = horizontal_max<Real>(r_top) * temper.binary;
    if (z_max > state.z_max || r_max > state.r_max) {
      const Real z_new = z_max > state.z_max ? z_max : state.z_max;
      const Real r_new = r_max > state.r_max ? r_max : state.r_max;
      Rescale<Real>(state.z_max, state.r_max, z_new, r_new).apply(total);
      state.z_max = z_new;
      state.r_max = r_new;
    }

    const Real z_shift = shift_of(state.z_max), r_shift = shift_of(state.r_max);
    RowSums<X> sums{};
    for (int64_t v = block; v < whole; v += lanes) {
      // While this block keeps the arithmetic busy, the next one comes out of memory.
      __builtin_prefetch(z_row.data + v + kBlock);
      __builtin_prefetch(r_row.data + v + kBlock);
      sums.template add<Math>(z_row.at(v), r_row.at(v), z_shift, r_shift, temper);
    }
    if (whole < stop)
      sums.template add<Math>(z_row.tail(whole, stop - whole), r_row.tail(whole, stop - whole), z_shift, r_shift,
                              temper);
    total += sums;
  }
  state.sums = {horizontal_sum<Real>(total.z_sum), horizontal_sum<Real>(total.r_sum), horizontal_sum<Real>(total.gap),
                horizontal_sum<Real>(total.bregman), horizontal_sum<Real>(total.z_dot)};
  const int64_t label = problem.labels[row] - problem.vocab_start;
  if (label >= begin && label < end) {
    state.z_label = z_row.one(label);
    state.r_label = r_row.one(label);
  }
  std::memcpy(out, &state, sizeof(state));
}

template <typename Math, typename Scalar, typename Out, bool kSoftcap, bool kReference>
void row_gradient_of(const Problem& problem, const Gradient& gradient, int64_t row, int64_t begin, int64_t end) {
  using X = typename Math::X;
  using Real = typename Math::Real;
  using OutVector = Vector<Math, Out>;
  constexpr int lanes = OutVector::lanes;
  const Row<Math, Scalar, kSoftcap> z_row(problem.logits, row, problem), r_row(problem.ref_logits, row, problem);
  Out* const out = static_cast<Out*>(gradient.out.data) + gradient.out.offset(row);
  const Real logp_grad = static_cast<const Real*>(gradient.logp_grad)[row];
  const Real kl_grad = static_cast<const Real*>(gradient.kl_grad)[row];
  RowState<Real> state;
  std::memcpy(&state, static_cast<const Real*>(gradient.states) + row * kRowStateSize, sizeof(state));
  const RowGradient<Real> coefficients(state, logp_grad, kl_grad, Temper<Real>(problem.temperature));

  // The label's logits are read now, before an in-place gradient overwrites them.
  const int64_t label = problem.labels[row] - problem.vocab_start;
  const bool has_label = label >= begin && label < end;
  const Real z_label = has_label ? z_row.one(label) : Real(0);
  const Real r_label = has_label && kReference ? r_row.one(label) : Real(0);

  const auto dz = [&](X z, X r, Real label_extra) TDPO_INLINE_LAMBDA {
    X value = coefficients.template policy_part<Math>(z);
    if constexpr (kReference) value = value - coefficients.template reference_part<Math>(r);
    value = value + label_extra;
    if constexpr (kSoftcap) {
      const X t = z * (Real(1) / z_row.softcap);
      value = value * (X{} + Real(1) - t * t);
    }
    return value;
  };
  const auto partial = [&](int64_t v, int64_t count) {
    Out padded[lanes];
    X r{};
    if constexpr (kReference) r = r_row.tail(v, count);
    OutVector::store(padded, dz(z_row.tail(v, count), r, Real(0)), false);
    std::memcpy(out + v, padded, count * sizeof(Out));
  };

  int64_t v = begin;
  const bool streaming = gradient.streaming_stores;
  if (streaming) {
    constexpr int64_t kAlign = lanes * sizeof(Out);
    const int64_t head = (kAlign - reinterpret_cast<uintptr_t>(out + v) % kAlign) % kAlign / sizeof(Out);
    const int64_t count = head < end - v ? head : end - v;
    if (count > 0) partial(v, count);
    v += count;
  }
  const auto sweep = [&](auto streams) TDPO_INLINE_LAMBDA {
    for (; v + lanes <= end; v += lanes) {
      X r{};
      if constexpr (kReference) r = r_row.at(v);
      OutVector::store(out + v, dz(z_row.at(v), r, Real(0)), streams());
    }
  };
  if (streaming)
    sweep([]() TDPO_INLINE_LAMBDA { return true; });
  else
    sweep([]() TDPO_INLINE_LAMBDA { return false; });
  if (v < end) partial(v, end - v);
  if (streaming) store_fence();

  if (has_label) {  // in float, before the one rounding
    Out padded[lanes];
    OutVector::store(padded, dz(X{} + z_label, X{} + r_label, coefficients.label_extra), false);
    out[label] = padded[0];
  }
}

template <typename Math, typename Scalar, typename Out, bool kSoftcap>
void gradient_of_row(const Problem& problem, const Gradient& gradient, int64_t row, int64_t begin, int64_t end) {
  using Real = typename Math::Real;
  const Real logp_grad = static_cast<const Real*>(gradient.logp_grad)[row];
  const Real kl_grad = static_cast<const Real*>(gradient.kl_grad)[row];
  if (problem.labels[row] == problem.ignore_index || (logp_grad == Real(0) && kl_grad == Real(0))) {
    Out* const out = static_cast<Out*>(gradient.out.data) + gradient.out.offset(row);
    std::memset(out + begin, 0, (end - begin) * sizeof(Out));
  } else if (kl_grad == Real(0)) {
    row_gradient_of<Math, Scalar, Out, kSoftcap, false>(problem, gradient, row, begin, end);
  } else {
    row_gradient_of<Math, Scalar, Out, kSoftcap, true>(problem, gradient, row, begin, end);
  }
}

// Calls f with the arithmetic and the scalar type that the logits' dtype stands for.
template <typename F>
void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(SimdMath{}, float{});
    case DType::f64:
      return f(ScalarMath<double>{}, double{});
    case DType::bf16:
      return f(SimdMath{}, bf16{});
    case DType::f16:
      return f(SimdMath{}, f16{});
  }
}

void row_state(const Problem& problem, int64_t row, int64_t begin, int64_t end, void* state) {
  with_dtype(problem.dtype, [&](auto math, auto scalar) {
    using Math = decltype(math);
    using Scalar = decltype(scalar);
    if (problem.labels[row] == problem.ignore_index) {
      const auto nothing = RowState<typename Math::Real>::empty();
      std::memcpy(state, &nothing, sizeof(nothing));
    } else if (problem.softcap > 0) {
      row_state_of<Math, Scalar, true>(problem, row, begin, end, state);
    } else {
      row_state_of<Math, Scalar, false>(problem, row, begin, end, state);
    }
  });
}

void logit_gradient(const Problem& problem, const Gradient& gradient, int64_t row, int64_t begin, int64_t end) {
  with_dtype(problem.dtype, [&](auto math, auto scalar) {
    using Math = decltype(math);
    using Scalar = decltype(scalar);
    const auto run = [&](auto out) {
      using Out = decltype(out);
      if (problem.softcap > 0)
        gradient_of_row<Math, Scalar, Out, true>(problem, gradient, row, begin, end);
      else
        gradient_of_row<Math, Scalar, Out, false>(problem, gradient, row, begin, end);
    };
    if constexpr (std::is_same_v<Scalar, float>) {
      if (gradient.out_dtype == DType::bf16) return run(bf16{});
      if (gradient.out_dtype == DType::f16) return run(f16{});
    }
    run(scalar);
  });
}

}  // namespace

extern const CpuKernels kernels{row_state, logit_gradient};

}  // namespace tdpo::TDPO_CPU_ISA
