// The real CUDA kernels on the emulator, against the scalar monoid in float64, for every regime of shape, alignment
// and dtype, in both thread orders.
#include <algorithm>
#include <array>
#include <random>

#include "../../csrc/cuda/token_divergence.cu"  // the launchers and, through them, the kernels

namespace {

using namespace tdpo;
using tdpo::cuda::to_real;
int failures = 0;

void expect_near(double got, double wanted, double tolerance, const char* what) {
  if (got == wanted || std::fabs(got - wanted) <= tolerance * (1 + std::fabs(wanted))) return;
  std::printf("FAILED: %s: %.9g, wanted %.9g\n", what, got, wanted);
  ++failures;
}

template <typename T>
struct Kind;
template <>
struct Kind<float> {
  static constexpr DType dtype = DType::f32;
  static constexpr double rounding = 1e-6;
};
template <>
struct Kind<double> {
  static constexpr DType dtype = DType::f64;
  static constexpr double rounding = 1e-12;
};
template <>
struct Kind<cuda::bf16> {
  static constexpr DType dtype = DType::bf16;
  static constexpr double rounding = 4e-3;
};
template <>
struct Kind<cuda::f16> {
  static constexpr DType dtype = DType::f16;
  static constexpr double rounding = 5e-4;
};

struct Shape {
  int64_t rows, vocab, slices, z_offset, r_offset, padding;  // offsets in entries from a 16-byte boundary
  double softcap, temperature;
  int64_t out_offset = 0;
};

template <typename T>
void check(const Shape& shape) {
  using Real = decltype(to_real(T{}));
  const auto [rows, vocab, slices, z_offset, r_offset, padding, softcap, temperature, out_offset] = shape;
  const int64_t stride = vocab + padding;
  std::mt19937 random(17);
  std::normal_distribution<double> normal;
  std::vector<T> z(rows * stride + 64), r(z.size());
  for (size_t i = 0; i < z.size(); ++i) {
    z[i] = cuda::Rounded<T>::of(Real(2 * normal(random)));
    r[i] = cuda::Rounded<T>::of(Real(to_real(z[i]) + 0.3 * normal(random)));
  }
  T* const z_data = z.data() + z_offset;
  T* const r_data = r.data() + r_offset;
  if (vocab > 3) z_data[2] = r_data[2] = cuda::Rounded<T>::of(Real(-INFINITY));
  std::vector<int64_t> labels(rows);
  for (int64_t row = 0; row < rows; ++row) labels[row] = row == 1 ? -100 : (row * 37 + 3) % vocab + 5;
  if (vocab > 3 && labels[0] == 7) labels[0] = 5;  // not the masked entry
  const Problem problem{{z_data, 1, stride, stride},
                        {r_data, 1, stride, stride},
                        labels.data(),
                        rows,
                        vocab,
                        5,
                        vocab + 5,
                        -100,
                        temperature,
                        softcap,
                        Kind<T>::dtype};

  std::vector<RowState<Real>> states(rows * slices), merged(rows);
  cuda::launch_row_states(problem, states.data(), slices, nullptr);
  cuda::launch_merge(states.data(), sizeof(Real) == 8, slices, rows, merged.data(), nullptr);
  std::vector<Real> values[kTokenValues];
  void* outputs[kTokenValues];
  for (int i = 0; i < kTokenValues; ++i) values[i].resize(rows), outputs[i] = values[i].data();
  cuda::launch_finalize(merged.data(), sizeof(Real) == 8, labels.data(), rows, -100, temperature, outputs, nullptr);

  std::vector<Real> logp_grad(rows), kl_grad(rows);
  for (int64_t row = 0; row < rows; ++row) {
    logp_grad[row] = Real(normal(random));
    kl_grad[row] = row == 2 ? Real(0) : Real(normal(random));
  }
  // Out of place into poisoned memory, then in place.
  std::vector<T> out(z.size(), cuda::Rounded<T>::of(Real(NAN)));
  Gradient gradient{merged.data(),  logp_grad.data(),
                    kl_grad.data(), {out.data() + out_offset, 1, stride, stride},
                    Kind<T>::dtype, false};
  cuda::launch_gradient(problem, gradient, nullptr);
  std::vector<T> in_place = z;
  Problem in_place_problem = problem;
  in_place_problem.logits.data = in_place.data() + z_offset;
  gradient.out.data = in_place_problem.logits.data;
  cuda::launch_gradient(in_place_problem, gradient, nullptr);

  const double value_tolerance = sizeof(Real) == 8 ? 1e-12 : 3e-6;
  for (int64_t row = 0; row < rows; ++row) {
    const auto capped = [&](T x) {
      return softcap > 0 ? softcap * std::tanh(to_real(x) / softcap) : double(to_real(x));
    };
    auto state = RowState<double>::empty();
    for (int64_t v = 0; v < vocab; ++v)
      state.update(capped(z_data[row * stride + v]), capped(r_data[row * stride + v]), Temper<double>(temperature));
    const int64_t label = labels[row] - 5;
    const bool ignored = labels[row] == -100;
    if (!ignored)
      state.z_label = capped(z_data[row * stride + label]), state.r_label = capped(r_data[row * stride + label]);
    const auto wanted = ignored ? TokenValues<double>{} : state.finalize(Temper<double>(temperature));
    expect_near(values[0][row], wanted.logp, value_tolerance, "logp");
    expect_near(values[1][row], wanted.ref_logp, value_tolerance, "ref_logp");
    expect_near(values[2][row], wanted.kl, value_tolerance, "kl");
    expect_near(values[3][row], wanted.entropy, value_tolerance, "entropy");
    expect_near(values[4][row], wanted.correct, 0, "correct");
    const RowGradient<double> exact(state, logp_grad[row], kl_grad[row], Temper<double>(temperature));
    for (int64_t v = 0; v < vocab; ++v) {
      const double z_entry = capped(z_data[row * stride + v]);
      double dz = exact.policy_part<ScalarMath<double>>(z_entry);
      if (kl_grad[row] != 0) dz -= exact.reference_part<ScalarMath<double>>(capped(r_data[row * stride + v]));
      if (v == label) dz += exact.label_extra;
      if (softcap > 0) dz *= 1 - z_entry / softcap * z_entry / softcap;
      if (ignored) dz = 0;
      const T got = out[out_offset + row * stride + v], got_in_place = in_place[z_offset + row * stride + v];
      expect_near(to_real(got), dz, Kind<T>::rounding, "gradient");
      if (std::memcmp(&got, &got_in_place, sizeof(T)) != 0) expect_near(0, 1, 0, "in place differs");
    }
    for (int64_t v = vocab; v < stride; ++v)
      if (!std::isnan(double(to_real(out[out_offset + row * stride + v])))) expect_near(0, 1, 0, "wrote past a row");
  }
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
