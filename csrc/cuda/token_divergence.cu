// Launch shapes and dtype dispatch of the kernels in token_divergence.cuh.
#include "launch.h"
#include "token_divergence.cuh"

namespace tdpo::cuda {
namespace {

// Entries below which a slice is not worth a CTA, and the entries of a gradient tile.
constexpr int64_t kMinSlice = 8192, kTile = 16384;
// CTAs of 256 threads that keep a multiprocessor busy.
constexpr int64_t kBlocksPerProcessor = 4;

int64_t blocks_for(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

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

template <typename T, typename Real, typename Out>
void launch_gradient_as(const Problem& problem, const Gradient& gradient, cudaStream_t stream) {
  const int64_t tiles = (problem.vocab + kTile - 1) / kTile;
  const auto grid = static_cast<unsigned>(problem.rows * tiles);
  if (problem.softcap > 0)
    TDPO_LAUNCH((gradient_kernel<T, Real, Out, true>), grid, kThreads, stream, problem, gradient, tiles, kTile);
  else
    TDPO_LAUNCH((gradient_kernel<T, Real, Out, false>), grid, kThreads, stream, problem, gradient, tiles, kTile);
}

}  // namespace

int64_t row_slices(int64_t rows, int64_t vocab, int multiprocessors) {
  const int64_t wanted = kBlocksPerProcessor * multiprocessors;
  if (rows <= 0 || rows >= wanted) return 1;
  const int64_t most = vocab / kMinSlice, enough = (wanted + rows - 1) / rows;
  return most < 1 ? 1 : (enough < most ? enough : most);
}

void launch_row_states(const Problem& problem, void* states, int64_t slices, cudaStream_t stream) {
  if (problem.rows == 0) return;
  // A multiple of 64 entries keeps the slices of an aligned row aligned.
  const int64_t length = ((problem.vocab + slices - 1) / slices + 63) / 64 * 64;
  const auto grid = static_cast<unsigned>(problem.rows * slices);
  with_dtype(problem.dtype, [&](auto scalar, auto real) {
    using T = decltype(scalar);
    using Real = decltype(real);
    auto* const out = static_cast<Real*>(states);
    if (problem.softcap > 0)
      TDPO_LAUNCH((row_state_kernel<T, Real, true>), grid, kThreads, stream, problem, out, slices, length);
    else
      TDPO_LAUNCH((row_state_kernel<T, Real, false>), grid, kThreads, stream, problem, out, slices, length);
  });
}

void launch_merge(const void* states, bool is_double, int64_t slices, int64_t rows, void* merged, cudaStream_t stream) {
  if (rows == 0) return;
  with_real(is_double, [&](auto real) {
    using State = RowState<decltype(real)>;
    TDPO_LAUNCH((merge_kernel<decltype(real)>), static_cast<unsigned>(blocks_for(rows)), kThreads, stream,
                static_cast<const State*>(states), slices, rows, static_cast<State*>(merged));
  });
}

void launch_finalize(const void* states, bool is_double, const int64_t* labels, int64_t rows, int64_t ignore_index,
                     double temperature, void* const outputs[4], cudaStream_t stream) {
  if (rows == 0) return;
  with_real(is_double, [&](auto real) {
    using Real = decltype(real);
    const ValueOutputs<Real> out{static_cast<Real*>(outputs[0]), static_cast<Real*>(outputs[1]),
                                 static_cast<Real*>(outputs[2]), static_cast<Real*>(outputs[3])};
    TDPO_LAUNCH((finalize_kernel<Real>), static_cast<unsigned>(blocks_for(rows)), kThreads, stream,
                static_cast<const RowState<Real>*>(states), labels, rows, ignore_index, temperature, out);
  });
}

void launch_gradient(const Problem& problem, const Gradient& gradient, cudaStream_t stream) {
  if (problem.rows == 0) return;
  with_dtype(problem.dtype, [&](auto scalar, auto real) {
    using T = decltype(scalar);
    using Real = decltype(real);
    if constexpr (sizeof(T) == 4) {  // float32 logits may leave as a low-precision gradient
      if (gradient.out_dtype == DType::bf16) return launch_gradient_as<T, Real, bf16>(problem, gradient, stream);
      if (gradient.out_dtype == DType::f16) return launch_gradient_as<T, Real, f16>(problem, gradient, stream);
    }
    launch_gradient_as<T, Real, T>(problem, gradient, stream);
  });
}

}  // namespace tdpo::cuda
