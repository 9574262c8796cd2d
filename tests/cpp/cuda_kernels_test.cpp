// The CUDA kernels and launchers on the emulator, for every regime of shape, alignment and dtype, in several
// thread orders.
#include <sys/mman.h>

#include <array>

#include "../../csrc/cuda/launch.cu"  // the launchers, which include the kernels
#include "row_cases.h"

namespace {

using namespace row_cases;

struct CudaKernels {
  template <typename State>
  std::vector<State> states(const DivergenceParams& params, int64_t slices) const {
    std::vector<State> states(params.rows * slices), merged(params.rows);
    cuda::launch_row_states(params, states.data(), slices, nullptr);
    cuda::launch_merge(states.data(), kind_of(params), slices, params.rows, merged.data(), nullptr);
    check_finalize(params, merged);
    return merged;
  }
  void gradient(const DivergenceParams& params, const GradientParams& grad) const {
    cuda::launch_gradient(params, grad, nullptr);
  }

  static cuda::StateKind kind_of(const DivergenceParams& params) {
    return {.is_double = params.dtype == DType::f64, .reverse_kl = params.reverse_kl};
  }

  template <typename State>
  void check_finalize(const DivergenceParams& params, const std::vector<State>& states) const {
    using Real = decltype(State::z_max);
    std::vector<Real> values(kTokenValues * params.rows, Real(NAN));
    cuda::launch_finalize(states.data(), kind_of(params), params.labels, params.rows, params.ignore_index,
                          params.temperature, values.data(), nullptr);
    for (int64_t row = 0; row < params.rows; ++row) {
      const bool ignored = params.labels[row] == params.ignore_index;
      TokenValues<Real> wanted{};
      if (!ignored) wanted = states[row].finalize(InvTemperature<Real>(params.temperature));
      const Real in_order[] = {wanted.logp,    wanted.ref_logp, wanted.kl,
                               wanted.entropy, wanted.correct,  Real(ignored ? 0 : 1)};
      for (int field = 0; field < kTokenValues; ++field)
        expect_near(values[field * params.rows + row], in_order[field], 0, "finalize kernel");
    }
  }
};

template <typename T>
void check(const Shape& shape) {
  row_cases::check<T>(shape, CudaKernels());
}

template <typename T>
void check_regimes() {
  using emulator::Order;
  for (auto order : {Order::ascending, Order::descending, Order::random, Order::random}) {
    emulator::order = order;  // each random one goes on where the one before it stopped
    // One warp per row.
    check<T>({.rows = 3, .vocab = 1});                        // a single entry
    check<T>({.rows = 11, .vocab = 7});                       // below one pack; rows of two CTAs
    check<T>({.rows = 4, .vocab = 507, .temperature = 0.7});  // rows of every alignment
    check<T>({.rows = 3, .vocab = 512});                      // aligned
    check<T>({.rows = 3,
              .vocab = 1000,
              .z_offset = 1,
              .r_offset = 1,
              .out_offset = 1,
              .padding = 3});  // the same misalignment: head and tail
    check<T>({.rows = 3, .vocab = 1000, .z_offset = 1, .r_offset = 2, .out_offset = 3});  // misaligned differently
    check<T>({.rows = 3, .vocab = 300, .slices = 7});                       // more slices than there are entries for
    check<T>({.rows = 3, .vocab = 700, .softcap = 3, .temperature = 1.3});  // softcap and temperature
    // One CTA per row.
    check<T>({.rows = 4, .vocab = 5003, .slices = 4, .padding = 5});  // a row over several CTAs
    check<T>({.rows = 2,
              .vocab = 9001,
              .z_offset = 1,
              .r_offset = 1,
              .out_offset = 1});                                             // batches and single packs, head and tail
    check<T>({.rows = 2, .vocab = 9000, .r_offset = 1, .padding = 2});       // the reference is aligned differently
    check<T>({.rows = 2, .vocab = 9000, .out_offset = 1});                   // the gradient is aligned differently
    check<T>({.rows = 2, .vocab = 6000, .softcap = 3, .temperature = 0.8});  // softcap and temperature
    check<T>({.rows = 4, .vocab = 20001});                                   // several gradient tiles
    check<T>({.rows = 2, .vocab = 9001, .slices = 2, .ref_offset = 50});     // the reference has an offset
    check<T>({.rows = 2, .vocab = 700, .temperature = 0.7, .ref_offset = -300});
  }
}

template <typename Out>
GradientParams plain_gradient(const std::vector<RowState<float>>& states, const std::vector<float>& logps_grad,
                              const std::vector<float>& kl_grad, Out* out, int64_t vocab) {
  return {
      .states = states.data(),
      .logps_grad = logps_grad.data(),
      .kl_grad = kl_grad.data(),
      .out = row_view(out, vocab),
      .out_dtype = Kind<Out>::dtype,
  };
}

// The gradient of float32 logits, rounded to 16 bits on its way out.
template <typename Out>
void check_narrow_gradient(int64_t vocab) {
  std::vector<float> z(2 * vocab), r(2 * vocab);
  for (size_t i = 0; i < z.size(); ++i) z[i] = std::sin(float(i)), r[i] = std::cos(float(i));
  const std::vector<int64_t> labels{4, 9};
  const DivergenceParams params = plain_params(z.data(), r.data(), labels, vocab);
  const auto states = CudaKernels().states<RowState<float>>(params, 1);
  const std::vector<float> logps_grad{0.5f, -1}, kl_grad{1, 0.25f};
  std::vector<float> wide(2 * vocab);
  std::vector<Out> narrow(2 * vocab);
  cuda::launch_gradient(params, plain_gradient(states, logps_grad, kl_grad, wide.data(), vocab), nullptr);
  cuda::launch_gradient(params, plain_gradient(states, logps_grad, kl_grad, narrow.data(), vocab), nullptr);
  for (size_t i = 0; i < wide.size(); ++i)
    expect_near(narrow[i].bits, cuda::Rounded<Out>::of(wide[i]).bits, 0, "rounded to 16 bits");
}

template <typename T>
void check_scale() {
  using Real = RealOf<T>;
  for (const int64_t offset : {0, 1, 3})
    for (const int64_t count : {1, 2, 700, 9001}) {
      std::vector<T> data(offset + count);
      for (size_t i = 0; i < data.size(); ++i) data[i] = cuda::Rounded<T>::of(Real(std::sin(float(i))));
      auto expected = data;
      for (const Real factor : {Real(1), Real(0.3)}) {
        cuda::launch_scale(data.data() + offset, Kind<T>::dtype, count, &factor, 1, nullptr);
        for (size_t i = offset; i < data.size(); ++i) expected[i] = cuda::Rounded<T>::of(to_real(expected[i]) * factor);
        if (std::memcmp(data.data(), expected.data(), data.size() * sizeof(T)) != 0) expect_near(0, 1, 0, "scaled");
      }
    }
}

// A logit of one model alone at -inf, and a row that begins with masked entries, of both kinds of mask, in the middle
// of packs.
void check_infinite_logits() {
  constexpr int64_t vocab = 9000;
  std::vector<float> z(2 * vocab), r(2 * vocab);
  for (size_t i = 0; i < z.size(); ++i) z[i] = std::sin(float(i)), r[i] = std::cos(float(i));
  z[4000] = -INFINITY;  // p = 0 where q > 0: an infinite KL
  for (int64_t i = 0; i < 6000; ++i) z[vocab + i] = r[vocab + i] = i < 3001 ? -1e30f : -INFINITY;
  const std::vector<int64_t> labels{4, 7000};
  const DivergenceParams params = plain_params(z.data(), r.data(), labels, vocab);
  const auto states = CudaKernels().states<RowState<float>>(params, 1);
  for (int64_t row = 0; row < 2; ++row) {
    auto wanted = RowState<double>::empty();
    for (int64_t v = 0; v < vocab; ++v)
      wanted.update(z[row * vocab + v], r[row * vocab + v], InvTemperature<double>(1));
    const double kl = states[row].finalize(InvTemperature<float>(1)).kl;
    expect_near(kl, wanted.finalize(InvTemperature<double>(1)).kl, 3e-6, "kl of infinite logits");
    expect_near(std::isinf(kl), row == 0, 0, "infinite kl");
  }
}

// Rows 3e9 entries apart: offsets need 64 bits. Of the address space, only the rows' own pages are ever touched.
void check_large_offsets() {
  constexpr int64_t vocab = 1504, stride = 3'000'000'000, bytes = (stride + vocab) * 2;
  const auto reserve = [&] {
    void* const data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    expect_near(data == MAP_FAILED, 0, 0, "address space");
    return static_cast<bf16*>(data);
  };
  bf16 *const z = reserve(), *const r = reserve();
  std::vector<bf16> near_z(2 * vocab), near_r(2 * vocab), expected(2 * vocab);
  for (int64_t i = 0; i < 2 * vocab; ++i) {
    const int64_t far = i / vocab * stride + i % vocab;
    near_z[i] = z[far] = cuda::Rounded<bf16>::of(std::sin(float(i)));
    near_r[i] = r[far] = cuda::Rounded<bf16>::of(std::cos(float(i)));
  }
  const std::vector<int64_t> labels{4, 9};
  const auto near = plain_params(near_z.data(), near_r.data(), labels, vocab);
  auto far = near;
  far.logits = row_view(z, stride), far.ref_logits = row_view(r, stride);
  const auto states = CudaKernels().states<RowState<float>>(near, 1),
             far_states = CudaKernels().states<RowState<float>>(far, 1);
  expect_near(std::memcmp(states.data(), far_states.data(), 2 * sizeof(states[0])), 0, 0, "states far apart");
  const std::vector<float> logps_grad{0.5f, -1}, kl_grad{1, 0.25f};
  auto grad = plain_gradient(states, logps_grad, kl_grad, expected.data(), vocab);
  cuda::launch_gradient(near, grad, nullptr);
  grad.out = far.logits;  // in place
  cuda::launch_gradient(far, grad, nullptr);
  for (int64_t row = 0; row < 2; ++row)
    expect_near(std::memcmp(z + row * stride, &expected[row * vocab], vocab * 2), 0, 0, "gradients far apart");
  munmap(z, bytes), munmap(r, bytes);
}

// The device's softcap within the bounds that stand beside it.
void check_softcap() {
  const cuda::Cap<float, true> cap(30);
  for (float x = -200; x < 200; x += 0.0037f) {
    const double exact = 30 * std::tanh(double(x) / 30), error = std::fabs(cap(x) - exact);
    const bool good = error <= 30 * (x > 0 ? 2e-7 : 4e-7) && (std::fabs(x) > 18 || error <= 3e-7 * std::fabs(exact));
    if (!good) expect_near(cap(x), exact, 0, "softcap");
  }
  expect_near(cap(1e-20f), 1e-20f, 0, "softcap of a small logit");
  expect_near(cap(INFINITY), 30, 0, "softcap of inf");
  expect_near(cap(-INFINITY), -30, 0, "softcap of -inf");
  expect_near(std::isnan(cap(NAN)), 1, 0, "softcap of NaN");
}

// Whatever the row's length, one thread alone says which label is wrong and stops the kernel.
void check_label_trap() {
  for (const int64_t vocab : {4, 600, 5000}) {
    std::vector<float> z(2 * vocab), r(2 * vocab);
    const std::vector<int64_t> labels{0, vocab};
    std::vector<RowState<float>> states(4);
    try {
      cuda::launch_row_states(plain_params(z.data(), r.data(), labels, vocab), states.data(), 2, nullptr);
      expect_near(0, 1, 0, "an out-of-range label is accepted");
    } catch (const std::runtime_error&) {
    }
    expect_near(emulator::traps, 1, 0, "threads that trap");
  }
}

}  // namespace

int main() {
  check_regimes<float>();
  check_regimes<double>();
  check_regimes<bf16>();
  check_regimes<f16>();
  for (const int64_t vocab : {300, 9003}) {
    check_narrow_gradient<bf16>(vocab);
    check_narrow_gradient<f16>(vocab);
  }
  check_scale<float>();
  check_scale<double>();
  check_scale<bf16>();
  check_scale<f16>();
  check_infinite_logits();
  check_large_offsets();
  check_softcap();
  check_label_trap();
  // (rows, vocabulary) -> slices on 132 multiprocessors, 396 CTAs at once.
  for (const auto [rows, vocab, slices] :
       {std::array<int64_t, 3>{1, 32, 1}, {8, 151936, 18}, {396, 151936, 1}, {600, 128256, 5}, {4096, 151936, 1}})
    expect_near(double(cuda::row_slices(rows, vocab, 132)), double(slices), 0, "row_slices");
  if (failures == 0) std::puts("cuda_kernels_test: passed");
  return failures == 0 ? 0 : 1;
}
