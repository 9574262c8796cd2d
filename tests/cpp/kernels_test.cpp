// The real CUDA kernels on the emulator, for every regime of shape, alignment and dtype, in both thread orders.
#include <array>

#include "../../csrc/cuda/token_divergence.cu"  // the launchers and, through them, the kernels
#include "row_cases.h"

namespace {

using namespace row_cases;

struct CudaKernels {
  template <typename Real>
  std::vector<RowState<Real>> states(const Problem& problem, int64_t slices) const {
    std::vector<RowState<Real>> states(problem.rows * slices), merged(problem.rows);
    cuda::launch_row_states(problem, states.data(), slices, nullptr);
    cuda::launch_merge(states.data(), sizeof(Real) == 8, slices, problem.rows, merged.data(), nullptr);
    check_finalize(problem, merged);
    return merged;
  }
  void gradient(const Problem& problem, const Gradient& gradient) const {
    cuda::launch_gradient(problem, gradient, nullptr);
  }

  template <typename Real>
  void check_finalize(const Problem& problem, const std::vector<RowState<Real>>& states) const {
    std::vector<Real> columns[kTokenValues];
    void* outputs[kTokenValues];
    for (int i = 0; i < kTokenValues; ++i) columns[i].resize(problem.rows), outputs[i] = columns[i].data();
    cuda::launch_finalize(states.data(), sizeof(Real) == 8, problem.labels, problem.rows, problem.ignore_index,
                          problem.temperature, outputs, nullptr);
    for (int64_t row = 0; row < problem.rows; ++row) {
      TokenValues<Real> wanted{};
      if (problem.labels[row] != problem.ignore_index) wanted = states[row].finalize(Temper<Real>(problem.temperature));
      const Real* value = &wanted.logp;
      for (int i = 0; i < kTokenValues; ++i) expect_near(columns[i][row], value[i], 0, "finalize kernel");
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
    // A warp a row.
    check<T>({3, 1, 1, 0, 0, 0, 0, 1});        // a single entry
    check<T>({11, 7, 1, 0, 0, 0, 0, 1});       // below one pack; rows of two CTAs
    check<T>({4, 507, 1, 0, 0, 0, 0, 0.7});    // rows of every alignment
    check<T>({3, 512, 1, 0, 0, 0, 0, 1});      // aligned
    check<T>({3, 1000, 1, 1, 1, 3, 0, 1, 1});  // the same misalignment: head and tail
    check<T>({3, 1000, 1, 1, 2, 0, 0, 1, 3});  // misalignments that never meet
    check<T>({3, 300, 7, 0, 0, 0, 0, 1});      // more slices than there are entries for
    check<T>({3, 700, 1, 0, 0, 0, 3, 1.3});    // softcap and temperature
    // A CTA a row.
    check<T>({3, 5003, 4, 0, 0, 5, 0, 1});     // a row over several CTAs
    check<T>({2, 9001, 1, 1, 1, 0, 0, 1, 1});  // batches and single packs, head and tail
    check<T>({2, 9000, 1, 0, 1, 2, 0, 1});     // the reference is aligned otherwise
    check<T>({2, 9000, 1, 0, 0, 0, 0, 1, 1});  // so is the gradient
    check<T>({2, 6000, 1, 0, 0, 0, 3, 0.8});   // softcap and temperature
    check<T>({1, 20000, 1, 0, 0, 0, 0, 1});    // several gradient tiles
  }
}

void check_narrowed() {
  std::vector<float> z(600), r(600);
  for (size_t i = 0; i < 600; ++i) z[i] = std::sin(float(i)), r[i] = std::cos(float(i));
  std::vector<int64_t> labels{4, 9};
  const Problem problem{
      {z.data(), 1, 300, 300}, {r.data(), 1, 300, 300}, labels.data(), 2, 300, 0, 300, -100, 1, 0, DType::f32};
  std::vector<RowState<float>> states(2);
  cuda::launch_row_states(problem, states.data(), 1, nullptr);
  const std::vector<float> logp_grad{0.5f, -1}, kl_grad{1, 0.25f};
  std::vector<float> wide(600);
  std::vector<cuda::bf16> narrow(600);
  cuda::launch_gradient(
      problem, {states.data(), logp_grad.data(), kl_grad.data(), {wide.data(), 1, 300, 300}, DType::f32, false},
      nullptr);
  cuda::launch_gradient(
      problem, {states.data(), logp_grad.data(), kl_grad.data(), {narrow.data(), 1, 300, 300}, DType::bf16, false},
      nullptr);
  for (size_t i = 0; i < 600; ++i)
    expect_near(narrow[i].bits, cuda::Rounded<cuda::bf16>::of(wide[i]).bits, 0, "narrowed");
}

void check_scale() {
  std::vector<cuda::bf16> data(700);
  for (size_t i = 0; i < 700; ++i) data[i] = cuda::Rounded<cuda::bf16>::of(std::sin(float(i)));
  auto expected = data;
  for (const float factor : {1.0f, 0.3f}) {
    cuda::launch_scale(data.data(), DType::bf16, 700, &factor, 1, nullptr);
    for (size_t i = 0; i < 700; ++i) {
      expected[i] = cuda::Rounded<cuda::bf16>::of(to_real(expected[i]) * factor);
      expect_near(data[i].bits, expected[i].bits, 0, "scaled");
    }
  }
}

void check_label_trap() {
  float z[4] = {}, r[4] = {};
  int64_t label = 4;
  RowState<float> state;
  const Problem problem{{z, 1, 4, 4}, {r, 1, 4, 4}, &label, 1, 4, 0, 4, -100, 1, 0, DType::f32};
  try {
    cuda::launch_row_states(problem, &state, 1, nullptr);
    expect_near(0, 1, 0, "a label out of range is let through");
  } catch (const std::runtime_error&) {
  }
}

}  // namespace

int main() {
  check_regimes<float>();
  check_regimes<double>();
  check_regimes<cuda::bf16>();
  check_regimes<cuda::f16>();
  check_narrowed();
  check_scale();
  check_label_trap();
  // (rows, vocabulary) -> slices on 132 multiprocessors, 396 CTAs at once.
  for (const auto [rows, vocab, slices] :
       {std::array<int64_t, 3>{1, 32, 1}, {8, 151936, 18}, {396, 151936, 1}, {600, 128256, 5}, {4096, 151936, 1}})
    expect_near(double(cuda::row_slices(rows, vocab, 132)), double(slices), 0, "row_slices");
  if (failures == 0) std::puts("kernels_test: all good");
  return failures == 0 ? 0 : 1;
}
