// The CPU kernels of every instruction set that this processor has.
#include "../../csrc/cpu/row_kernels.h"
#include "row_cases.h"

namespace {

using namespace row_cases;

struct Kernels {
  const CpuKernels& kernels;

  template <typename State>
  std::vector<State> states(const DivergenceParams& params, int64_t slices) const {
    const int64_t length = std::max<int64_t>(1, (params.vocab + slices - 1) / slices);
    std::vector<State> merged;
    for (int64_t row = 0; row < params.rows; ++row) {
      merged.push_back(State::empty());
      for (int64_t begin = 0; begin < params.vocab; begin += length) {
        State state;
        kernels.row_state(params, row, begin, std::min(params.vocab, begin + length), &state);
        merged.back().merge(state);
      }
    }
    return merged;
  }
  void gradient(const DivergenceParams& params, const GradientParams& grad) const {
    for (bool streaming : {true, false}) {
      if (streaming && grad.out.data == params.logits.data) continue;
      for (int64_t row = 0; row < params.rows; ++row)
        kernels.logit_gradient(params, grad, streaming, row, 0, params.vocab);
    }
  }
};

template <typename T>
void check_regimes(const CpuKernels& kernels) {
  for (int64_t vocab : {1, 7, 15, 16, 17, 507, 512, 2047, 2048, 2049, 5003})
    check<T>({.rows = 3, .vocab = vocab}, Kernels{kernels});
  check<T>({.rows = 3, .vocab = 1000, .z_offset = 1, .r_offset = 2, .out_offset = 3, .padding = 3, .temperature = 0.7},
           Kernels{kernels});  // every alignment
  check<T>({.rows = 3, .vocab = 5003, .slices = 4, .out_offset = 1, .padding = 5}, Kernels{kernels});  // slices
  check<T>({.rows = 3, .vocab = 700, .softcap = 3, .temperature = 1.3}, Kernels{kernels});  // softcap and temperature
  for (double offset : {50.0, -300.0})
    check<T>({.rows = 3, .vocab = 5003, .slices = 2, .temperature = 0.7, .ref_offset = offset}, Kernels{kernels});
}

// Gradients half-way between two numbers of a low precision are rounded to the even one. `half_step` is half of the
// distance between those from `base` on.
template <typename Out>
void check_ties(const CpuKernels& kernels, DType out_dtype, float base, float half_step) {
  constexpr int64_t vocab = 64;
  std::vector<float> z(vocab, 0), r(vocab, 0);
  std::vector<Out> out(vocab);
  const std::vector<int64_t> labels{0};
  const float kl_grad = 0;
  const RowState<float> state{0, 0, {1, 1, 0, 0, 0}, 0, 0};
  for (int step = 1; step < 64; step += 2) {
    const float logps_grad = -(base + float(step) * half_step);  // every other entry's gradient is -logps_grad
    const DivergenceParams params = plain_params(z.data(), r.data(), labels, vocab);
    const GradientParams grad{.states = &state,
                              .logps_grad = &logps_grad,
                              .kl_grad = &kl_grad,
                              .out = row_view(out.data(), vocab),
                              .out_dtype = out_dtype};
    kernels.logit_gradient(params, grad, false, 0, 0, vocab);
    const float even = base + float((step + 1) / 4 * 4) * half_step;
    for (int64_t v = 1; v < vocab; ++v) expect_near(to_real(out[v]), even, 0, "a tie is rounded to even");
  }
}

void check_all(const char* name, const CpuKernels& kernels) {
  const int before = failures;
  check_regimes<float>(kernels);
  check_regimes<double>(kernels);
  check_regimes<bf16>(kernels);
  check_regimes<f16>(kernels);
  check_ties<bf16>(kernels, DType::bf16, 1, 0x1p-8f);
  check_ties<f16>(kernels, DType::f16, 1, 0x1p-11f);
  check_ties<f16>(kernels, DType::f16, 0, 0x1p-25f);  // subnormal
  std::printf("%s: %s\n", name, failures == before ? "passed" : "FAILED");
}

}  // namespace

int main() {
  check_all("baseline", DEFAULT::kernels);
#if defined(TDPO_X86)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) check_all("AVX2", AVX2::kernels);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    check_all("AVX-512", AVX512::kernels);
#endif
  return failures == 0 ? 0 : 1;
}
