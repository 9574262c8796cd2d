// Launch shapes and dtype dispatch of the kernels in row_kernels.cuh.
#include <algorithm>

#include "launch.h"
#include "row_kernels.cuh"

namespace tdpo::cuda {
namespace {

constexpr int64_t kMinSlice = 8192;  // entries below which a slice is not worth a CTA
constexpr int64_t kTile = 16384;     // entries of a row that one group of the gradient kernel processes
constexpr int64_t kShortRow = 1024;  // rows up to this long are processed by a warp, longer ones by a CTA

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
unsigned blocks_for(int64_t threads) { return static_cast<unsigned>(ceil_div(threads, kThreads)); }

// Calls f with an empty state of this kind.
template <typename F>
void with_state(StateKind kind, F f) {
  with_constant(kind.reverse_kl, [&](auto reverse) {
    if (kind.is_double)
      f(RowState<double, reverse()>::empty());
    else
      f(RowState<float, reverse()>::empty());
  });
}

// Calls f(cap, reverse, threads per group, CTAs), the middle two compile-time constants, for rows of `parts` parts
// each.
template <typename Real, typename F>
void with_variant(const DivergenceParams& params, int64_t parts, F f) {
  const auto with_group = [&](auto group) {
    const auto blocks = static_cast<unsigned>(ceil_div(params.rows, kThreads / group()) * parts);
    with_row_kind(params, [&](auto softcap, auto reverse) {
      f(Cap<Real, softcap()>(softcap() ? params.softcap : 1), reverse, group, blocks);
    });
  };
  if (params.vocab <= kShortRow)
    with_group(std::integral_constant<int, kWarp>{});
  else
    with_group(std::integral_constant<int, kThreads>{});
}

}  // namespace

int64_t row_slices(int64_t rows, int64_t vocab, int multiprocessors) {
  const int64_t concurrent = int64_t(kResidentBlocks) * multiprocessors, max_slices = vocab / kMinSlice;
  if (rows <= 0) return 1;
  // The fewest slices whose CTAs fill the last wave, or take so many waves that the last one does not matter.
  int64_t best = 1;
  double best_fill = 0;
  for (int64_t slices = 1; slices <= max_slices; ++slices) {
    const int64_t waves = ceil_div(rows * slices, concurrent);
    const double fill = double(rows * slices) / double(waves * concurrent);
    if (fill > best_fill) best = slices, best_fill = fill;
    if (fill > 0.95 || waves > 8) break;
  }
  return best;
}

void launch_row_states(const DivergenceParams& params, void* states, int64_t slices, cudaStream_t stream) {
  if (params.rows == 0) return;
  // A multiple of 64 entries keeps the slices of an aligned row aligned.
  const int64_t length = std::max<int64_t>(64, ceil_div(ceil_div(params.vocab, slices), 64) * 64);
  with_scalar(params.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    using Real = RealOf<T>;
    with_variant<Real>(params, slices, [&](auto cap, auto reverse, auto group, unsigned blocks) {
      TDPO_LAUNCH((row_state_kernel<T, Real, decltype(cap)::enabled, reverse(), group()>), blocks, kThreads, stream,
                  params, cap, InvTemperature<Real>(params.temperature), static_cast<Real*>(states), unsigned(slices),
                  length);
    });
  });
}

void launch_merge(const void* states, StateKind kind, int64_t slices, int64_t rows, void* merged, cudaStream_t stream) {
  if (rows == 0) return;
  with_state(kind, [&](auto empty) {
    using State = decltype(empty);
    TDPO_LAUNCH((merge_kernel<State>), blocks_for(rows), kThreads, stream, static_cast<const State*>(states), slices,
                rows, static_cast<State*>(merged));
  });
}

void launch_finalize(const void* states, StateKind kind, const int64_t* labels, int64_t rows, int64_t ignore_index,
                     double temperature, void* values, cudaStream_t stream) {
  if (rows == 0) return;
  with_state(kind, [&](auto empty) {
    using State = decltype(empty);
    using Real = decltype(empty.z_max);
    TDPO_LAUNCH((finalize_kernel<State, Real>), blocks_for(rows), kThreads, stream, static_cast<const State*>(states),
                labels, rows, ignore_index, temperature, static_cast<Real*>(values));
  });
}

void launch_gradient(const DivergenceParams& params, const GradientParams& grad, cudaStream_t stream) {
  if (params.rows == 0 || params.vocab == 0) return;
  const int64_t tiles = ceil_div(params.vocab, kTile);
  with_gradient_scalars(params.dtype, grad.out_dtype, [&](auto scalar, auto out) {
    using T = decltype(scalar);
    using Real = RealOf<T>;
    with_variant<Real>(params, tiles, [&](auto cap, auto reverse, auto group, unsigned blocks) {
      TDPO_LAUNCH((gradient_kernel<T, Real, decltype(out), decltype(cap)::enabled, reverse(), group()>), blocks,
                  kThreads, stream, params, grad, cap, InvTemperature<Real>(params.temperature), unsigned(tiles),
                  kTile);
    });
  });
}

void launch_scale(void* data, DType dtype, int64_t count, const void* factor, int multiprocessors,
                  cudaStream_t stream) {
  if (count == 0) return;
  const int64_t max_blocks = int64_t(8) * multiprocessors;
  with_scalar(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    using Real = RealOf<T>;
    const auto grid = std::min(blocks_for(ceil_div(count, Pack<T>::size)), static_cast<unsigned>(max_blocks));
    TDPO_LAUNCH((scale_kernel<T, Real>), grid, kThreads, stream, static_cast<T*>(data), count,
                static_cast<const Real*>(factor));
  });
}

}  // namespace tdpo::cuda
