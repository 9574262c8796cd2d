// The CPU row kernels, compiled once per instruction set (CMakeLists.txt), each copy in its own namespace.
//
// A row is processed in blocks that fit the L1 cache, each read twice: once for the maxima, once for the sums. Memory
// is therefore read once, exponentials are taken once per logit, and the sums are rescaled only when a block raises a
// maximum. Each block has its own partial sums, 128 entries per lane, so rounding errors do not grow with the
// vocabulary.
#include "row_kernels.h"

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

  Row(const RowView& rows, int64_t row, const DivergenceParams& params)
      : data(static_cast<const Scalar*>(rows.data) + rows.offset(row)), softcap(Real(params.softcap)) {}

  TDPO_FN X capped(X x) const {
    if constexpr (kSoftcap) return tanh_of<Math>(x * (Real(1) / softcap)) * softcap;
    return x;
  }
  TDPO_FN X vector(int64_t v) const { return capped(V::load(data + v)); }

  // Fewer entries than lanes, padded with -inf, which contributes nothing to any sum.
  TDPO_FN X tail(int64_t v, int64_t count) const {
    Scalar padded[lanes];
    std::memcpy(padded, data + v, count * sizeof(Scalar));
    X x = capped(V::load(padded));
    Real* entries = reinterpret_cast<Real*>(&x);
    for (int64_t i = count; i < lanes; ++i) entries[i] = -std::numeric_limits<Real>::infinity();
    return x;
  }
  TDPO_FN Real entry(int64_t v) const {
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

template <typename Math, typename Scalar, bool kSoftcap, bool kReverse>
void compute_row_state(const DivergenceParams& params, int64_t row, int64_t begin, int64_t end, void* out) {
  using X = typename Math::X;
  using Real = typename Math::Real;
  constexpr int lanes = Vector<Math, Scalar>::lanes;
  const Row<Math, Scalar, kSoftcap> z_row(params.logits, row, params), r_row(params.ref_logits, row, params);
  const InvTemperature<Real> inv_temp(params.temperature);
  const Real lowest = -std::numeric_limits<Real>::infinity();

  auto state = RowState<Real, kReverse>::empty();
  RowSums<X, kReverse> total{};
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = block + kBlock < end ? block + kBlock : end;
    const int64_t whole = block + (stop - block) / lanes * lanes;

    X z_top = X{} + lowest, r_top = X{} + lowest;
    for (int64_t v = block; v < whole; v += lanes) {
      z_top = maximum(z_row.vector(v), z_top);
      r_top = maximum(r_row.vector(v), r_top);
    }
    if (whole < stop) {
      z_top = maximum(z_row.tail(whole, stop - whole), z_top);
      r_top = maximum(r_row.tail(whole, stop - whole), r_top);
    }
    const Real z_max = running_max(state.z_max, horizontal_max<Real>(z_top) * inv_temp.base2);
    const Real r_max = running_max(state.r_max, horizontal_max<Real>(r_top) * inv_temp.base2);
    if (z_max > state.z_max || r_max > state.r_max) {
      Rescale<Real, kReverse>(state.z_max, state.r_max, z_max, r_max).apply(total);
      state.z_max = z_max;
      state.r_max = r_max;
    }

    const Shifts<Real> shifts(state.z_max, state.r_max, inv_temp);
    RowSums<X, kReverse> sums{};
    const auto add_block = [&](auto centered) TDPO_INLINE_LAMBDA {
      for (int64_t v = block; v < whole; v += lanes) {
        // Fetches the next block from memory while this one keeps the arithmetic units busy.
        __builtin_prefetch(z_row.data + v + kBlock);
        __builtin_prefetch(r_row.data + v + kBlock);
        sums.template add<Math, centered()>(z_row.vector(v), r_row.vector(v), shifts, inv_temp);
      }
    };
    if (shifts.far_apart())
      add_block(std::true_type{});
    else
      add_block(std::false_type{});
    if (whole < stop)
      sums.template add<Math, true>(z_row.tail(whole, stop - whole), r_row.tail(whole, stop - whole), shifts, inv_temp);
    total += sums;
  }
  state.sums = {horizontal_sum<Real>(total.z_sum), horizontal_sum<Real>(total.r_sum), horizontal_sum<Real>(total.gap),
                horizontal_sum<Real>(total.bregman), horizontal_sum<Real>(total.z_dot)};
  const int64_t label = params.labels[row] - params.vocab_start;
  if (label >= begin && label < end) {
    state.z_label = z_row.entry(label);
    state.r_label = r_row.entry(label);
  }
  std::memcpy(out, &state, sizeof(state));
}

template <typename Math, typename Scalar, typename Out, bool kSoftcap, bool kReverse, bool kReference>
void write_row_gradient(const DivergenceParams& params, const GradientParams& grad, bool streaming, int64_t row,
                        int64_t begin, int64_t end) {
  using X = typename Math::X;
  using Real = typename Math::Real;
  using OutVector = Vector<Math, Out>;
  constexpr int lanes = OutVector::lanes;
  const Row<Math, Scalar, kSoftcap> z_row(params.logits, row, params), r_row(params.ref_logits, row, params);
  Out* const out = static_cast<Out*>(grad.out.data) + grad.out.offset(row);
  const Real logps_grad = static_cast<const Real*>(grad.logps_grad)[row];
  const Real kl_grad = static_cast<const Real*>(grad.kl_grad)[row];
  RowState<Real, kReverse> state;
  std::memcpy(&state, static_cast<const Real*>(grad.states) + row * kRowStateSize, sizeof(state));
  const RowGradient<Real, kReverse> gradient(state, logps_grad, kl_grad, InvTemperature<Real>(params.temperature));

  // Read the label's logits before an in-place gradient overwrites them.
  const int64_t label = params.labels[row] - params.vocab_start;
  const bool has_label = label >= begin && label < end;
  const Real z_label = has_label ? z_row.entry(label) : Real(0);
  const Real r_label = has_label && kReference ? r_row.entry(label) : Real(0);

  const auto dz = [&](X z, X r, Real label_extra) TDPO_INLINE_LAMBDA {
    X value = gradient.template at<Math, kReference>(z, r) + label_extra;
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
      if constexpr (kReference) r = r_row.vector(v);
      OutVector::store(out + v, dz(z_row.vector(v), r, Real(0)), streams());
    }
  };
  if (streaming)
    sweep([]() TDPO_INLINE_LAMBDA { return true; });
  else
    sweep([]() TDPO_INLINE_LAMBDA { return false; });
  if (v < end) partial(v, end - v);
  if (streaming) store_fence();

  if (has_label) {  // recomputed, so that label_extra is added before the only rounding
    Out padded[lanes];
    OutVector::store(padded, dz(X{} + z_label, X{} + r_label, gradient.label_extra), false);
    out[label] = padded[0];
  }
}

template <typename Math, typename Scalar, typename Out, bool kSoftcap, bool kReverse>
void row_gradient(const DivergenceParams& params, const GradientParams& grad, bool streaming, int64_t row,
                  int64_t begin, int64_t end) {
  using Real = typename Math::Real;
  const Real logps_grad = static_cast<const Real*>(grad.logps_grad)[row];
  const Real kl_grad = static_cast<const Real*>(grad.kl_grad)[row];
  if (params.labels[row] == params.ignore_index || (logps_grad == Real(0) && kl_grad == Real(0))) {
    Out* const out = static_cast<Out*>(grad.out.data) + grad.out.offset(row);
    std::memset(out + begin, 0, (end - begin) * sizeof(Out));
  } else if (kl_grad == Real(0)) {
    write_row_gradient<Math, Scalar, Out, kSoftcap, kReverse, false>(params, grad, streaming, row, begin, end);
  } else {
    write_row_gradient<Math, Scalar, Out, kSoftcap, kReverse, true>(params, grad, streaming, row, begin, end);
  }
}

template <typename Scalar>
using MathOf = std::conditional_t<std::is_same_v<Scalar, double>, ScalarMath<double>, SimdMath>;

void row_state(const DivergenceParams& params, int64_t row, int64_t begin, int64_t end, void* state) {
  with_scalar(params.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    using Math = MathOf<Scalar>;
    if (params.labels[row] == params.ignore_index) {
      const auto empty = RowState<typename Math::Real>::empty();
      std::memcpy(state, &empty, sizeof(empty));
    } else {
      with_row_kind(params, [&](auto softcap, auto reverse) {
        compute_row_state<Math, Scalar, softcap(), reverse()>(params, row, begin, end, state);
      });
    }
  });
}

void logit_gradient(const DivergenceParams& params, const GradientParams& grad, bool streaming, int64_t row,
                    int64_t begin, int64_t end) {
  with_gradient_scalars(params.dtype, grad.out_dtype, [&](auto scalar, auto out) {
    using Scalar = decltype(scalar);
    using Out = decltype(out);
    with_row_kind(params, [&](auto softcap, auto reverse) {
      row_gradient<MathOf<Scalar>, Scalar, Out, softcap(), reverse()>(params, grad, streaming, row, begin, end);
    });
  });
}

}  // namespace

extern const CpuKernels kernels{row_state, logit_gradient};

}  // namespace tdpo::TDPO_CPU_ISA
