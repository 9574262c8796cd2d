// The CUDA kernels and launchers on the emulator, for every regime of shape, alignment and dtype, in both thread
// orders.
#include <array>

#include "../../csrc/cuda/launch.cu"  // the launchers, which include the kernels
#include "row_cases.h"

namespace {

using namespace row_cases;

struct CudaKernels {
  template <typename Real>
  std::vector<RowState<Real>> states(const DivergenceParams& params, int64_t slices) const {
    std::vector<RowState<Real>> states(params.rows * slices), merged(params.rows);
    cuda::launch_row_states(params, states.data(), slices, nullptr);
    cuda::launch_merge(states.data(), sizeof(Real) == 8, slices, params.rows, merged.data(), nullptr);
    check_finalize(params, merged);
    return merged;
  }
  void gradient(const DivergenceParams& params, const GradientParams& grad) const {
    cuda::launch_gradient(params, grad, nullptr);
  }

  template <typename Real>
  void check_finalize(const DivergenceParams& params, const std::vector<RowState<Real>>& states) const {
    std::vector<Real> values(kTokenValues * params.rows, Real(NAN));
    cuda::launch_finalize(states.data(), sizeof(Real) == 8, params.labels, params.rows, params.ignore_index,
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
  for (bool backwards : {false, true}) {
    emulator::backwards = backwards;
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
    check<T>({.rows = 3, .vocab = 5003, .slices = 4, .padding = 5});  // a row over several CTAs
    check<T>({.rows = 2,
              .vocab = 9001,
              .z_offset = 1,
              .r_offset = 1,
              .out_offset = 1});                                             // batches and single packs, head and tail
    check<T>({.rows = 2, .vocab = 9000, .r_offset = 1, .padding = 2});       // the reference is aligned differently
    check<T>({.rows = 2, .vocab = 9000, .out_offset = 1});                   // the gradient is aligned differently
    check<T>({.rows = 2, .vocab = 6000, .softcap = 3, .temperature = 0.8});  // softcap and temperature
    check<T>({.rows = 1, .vocab = 20000});                                   // several gradient tiles
  }
}

void check_bfloat16_gradient() {
  std::vector<float> z(600), r(600);
  for (size_t i = 0; i < 600; ++i) z[i] = std::sin(float(i)), r[i] = std::cos(float(i));
  std::vector<int64_t> labels{4, 9};
  const DivergenceParams params{
      .logits = row_view(z.data(), 300),
      .ref_logits = row_view(r.data(), 300),
      .labels = labels.data(),
      .rows = 2,
      .vocab = 300,
      .vocab_start = 0,
      .vocab_size = 300,
      .ignore_index = -100,
      .temperature = 1,
      .softcap = 0,
      .dtype = DType::f32,
  };
  std::vector<RowState<float>> states(2);
  cuda::launch_row_states(params, states.data(), 1, nullptr);
  const std::vector<float> logps_grad{0.5f, -1}, kl_grad{1, 0.25f};
  std::vector<float> wide(600);
  std::vector<bf16> narrow(600);
  GradientParams grad{
      .states = states.data(),
      .logps_grad = logps_grad.data(),
      .kl_grad = kl_grad.data(),
      .out = row_view(wide.data(), 300),
      .out_dtype = DType::f32,
      .streaming_stores = false,
  };
  cuda::launch_gradient(params, grad, nullptr);
  grad.out = row_view(narrow.data(), 300);
  grad.out_dtype = DType::bf16;
  cuda::launch_gradient(params, grad, nullptr);
  for (size_t i = 0; i < 600; ++i)
    expect_near(narrow[i].bits, cuda::Rounded<bf16>::of(wide[i]).bits, 0, "rounded to bfloat16");
}

void check_scale() {
  std::vector<bf16> data(700);
  for (size_t i = 0; i < 700; ++i) data[i] = cuda::Rounded<bf16>::of(std::sin(float(i)));
  auto expected = data;
  for (const float factor : {1.0f, 0.3f}) {
    cuda::launch_scale(data.data(), DType::bf16, 700, &factor, 1, nullptr);
    for (size_t i = 0; i < 700; ++i) {
      expected[i] = cuda::Rounded<bf16>::of(to_real(expected[i]) * factor);
      expect_near(data[i].bits, expected[i].bits, 0, "scaled");
    }
  }
}

void check_label_trap() {
  float z[4] = {}, r[4] = {};
  int64_t label = 4;
  RowState<float> state;
  const DivergenceParams params{
      .logits = row_view(z, 4),
      .ref_logits = row_view(r, 4),
      .labels = &label,
      .rows = 1,
      .vocab = 4,
      .vocab_start = 0,
      .vocab_size = 4,
      .ignore_index = -100,
      .temperature = 1,
      .softcap = 0,
      .dtype = DType::f32,
  };
  try {
    cuda::launch_row_states(params, &state, 1, nullptr);
    expect_near(0, 1, 0, "an out-of-range label is accepted");
  } catch (const std::runtime_error&) {
  }
}

}  // namespace

int main() {
  check_regimes<float>();
  check_regimes<double>();
  check_regimes<bf16>();
  check_regimes<f16>();
  check_bfloat16_gradient();
  check_scale();
  check_label_trap();
  // (rows, vocabulary) -> slices on 132 multiprocessors, 396 CTAs at once.
  for (const auto [rows, vocab, slices] :
       {std::array<int64_t, 3>{1, 32, 1}, {8, 151936, 18}, {396, 151936, 1}, {600, 128256, 5}, {4096, 151936, 1}})
    expect_near(double(cuda::row_slices(rows, vocab, 132)), double(slices), 0, "row_slices");
  if (failures == 0) std::puts("cuda_kernels_test: passed");
  return failures == 0 ? 0 : 1;
}
