// Launch shapes and dtype dispatch of the kernels in token_divergence.cuh.
#include <algorithm>

#include "launch.h"
#include "token_divergence.cuh"

namespace tdpo::cuda {
namespace {

// Entries below which a slice is not worth a CTA, the entries of a gradient tile, and those of a row that a warp takes.
constexpr int64_t kMinSlice = 8192, kTile = 16384, kShortRow = 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
unsigned blocks_for(int64_t threads) { return static_cast<unsigned>(ceil_div(threads, kThreads)); }

// f(scalar, its real type): calls f with values whose types the dtype stands for.
template <typename F>
void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(float{}, float{});
    case DType::f64:
      return f(double{}, double{});
    case DType::bf16:
      return f(bf16{}, float{});
    case DType::f16:
      return f(f16{}, float{});
  }
}

template <typename F>
void with_real(bool is_double, F f) {
  if (is_double)
    f(double{});
  else
    f(float{});
}

// f(softcap or none, threads of a group), both compile-time.
template <typename F>
void with_variant(const Problem& problem, F f) {
  const auto with_group = [&](auto group) {
    if (problem.softcap > 0)
      f(std::true_type{}, group);
    else
      f(std::false_type{}, group);
  };
  if (problem.vocab <= kShortRow)
    with_group(std::integral_constant<int, kWarp>{});
  else
    with_group(std::integral_constant<int, kThreads>{});
}

template <typename T, typename Real, typename Out>
void launch_gradient_as(const Problem& problem, const Gradient& gradient, cudaStream_t stream) {
  const int64_t tiles = ceil_div(problem.vocab, kTile);
  with_variant(problem, [&](auto softcap, auto group) {
    TDPO_LAUNCH((gradient_kernel<T, Real, Out, softcap(), group()>), blocks_for(problem.rows * tiles * group()),
                kThreads, stream, problem, gradient, tiles, kTile);
  });
}

}  // namespace

int64_t row_slices(int64_t rows, int64_t vocab, int multiprocessors) {
  const int64_t at_once = int64_t(kResidentBlocks) * multiprocessors, most = vocab / kMinSlice;
  if (rows <= 0) return 1;
  // The fewest slices whose CTAs fill their last wave, or are so many waves that it does not matter.
  int64_t best = 1;
  double best_fill = 0;
  for (int64_t slices = 1; slices <= most; ++slices) {
    const int64_t waves = ceil_div(rows * slices, at_once);
    const double fill = double(rows * slices) / double(waves * at_once);
    if (fill > best_fill) best = slices, best_fill = fill;
    if (fill > 0.95 || waves > 8) break;
  }
  return best;
}

void launch_row_states(const Problem& problem, void* states, int64_t slices, cudaStream_t stream) {
  if (problem.rows == 0) return;
  // A multiple of 64 entries keeps the slices of an aligned row aligned.
  const int64_t length = std::max<int64_t>(64, ceil_div(ceil_div(problem.vocab, slices), 64) * 64);
  with_dtype(problem.dtype, [&](auto scalar, auto real) {
    using T = decltype(scalar);
    using Real = decltype(real);
    with_variant(problem, [&](auto softcap, auto group) {
      TDPO_LAUNCH((row_state_kernel<T, Real, softcap(), group()>), blocks_for(problem.rows * slices * group()),
                  kThreads, stream, problem, static_cast<Real*>(states), slices, length);
    });
  });
}

void launch_merge(const void* states, bool is_double, int64_t slices, int64_t rows, void* merged, cudaStream_t stream) {
  if (rows == 0) return;
  with_real(is_double, [&](auto real) {
    using State = RowState<decltype(real)>;
    TDPO_LAUNCH((merge_kernel<decltype(real)>), blocks_for(rows), kThreads, stream, static_cast<const State*>(states),
                slices, rows, static_cast<State*>(merged));
  });
}

void launch_finalize(const void* states, bool is_double, const int64_t* labels, int64_t rows, int64_t ignore_index,
                     double temperature, void* const outputs[5], cudaStream_t stream) {
  if (rows == 0) return;
  with_real(is_double, [&](auto real) {
    using Real = decltype(real);
    const ValueOutputs<Real> out{static_cast<Real*>(outputs[0]), static_cast<Real*>(outputs[1]),
                                 static_cast<Real*>(outputs[2]), static_cast<Real*>(outputs[3]),
                                 static_cast<Real*>(outputs[4])};
    TDPO_LAUNCH((finalize_kernel<Real>), blocks_for(rows), kThreads, stream, static_cast<const RowState<Real>*>(states),
                labels, rows, ignore_index, temperature, out);
  });
}

void launch_gradient(const Problem& problem, const Gradient& gradient, cudaStream_t stream) {
  if (problem.rows == 0 || problem.vocab == 0) return;
  with_dtype(problem.dtype, [&](auto scalar, auto real) {
    using T = decltype(scalar);
    using Real = decltype(real);
    if constexpr (std::is_same_v<T, float>) {  // float32 logits may leave as a low-precision gradient
      if (gradient.out_dtype == DType::bf16) return launch_gradient_as<T, Real, bf16>(problem, gradient, stream);
      if (gradient.out_dtype == DType::f16) return launch_gradient_as<T, Real, f16>(problem, gradient, stream);
    }
    launch_gradient_as<T, Real, T>(problem, gradient, stream);
  });
}

void launch_scale(void* data, DType dtype, int64_t count, const void* factor, int multiprocessors,
                  cudaStream_t stream) {
  if (count == 0) return;
  const int64_t most = int64_t(8) * multiprocessors;
  const auto grid = static_cast<unsigned>(std::min<int64_t>(blocks_for(count), most));
  with_dtype(dtype, [&](auto scalar, auto real) {
    using T = decltype(scalar);
    using Real = decltype(real);
    TDPO_LAUNCH((scale_kernel<T, Real>), grid, kThreads, stream, static_cast<T*>(data), count,
                static_cast<const Real*>(factor));
  });
}

}  // namespace tdpo::cuda
