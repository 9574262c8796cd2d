// The CPU kernels of every instruction set that this processor has, over the same shapes as the CUDA kernels.
#include "../../csrc/cpu/kernels.h"
#include "row_cases.h"

namespace {

using namespace row_cases;

struct Kernels {
  const CpuKernels& kernels;

  template <typename Real>
  std::vector<RowState<Real>> states(const Problem& problem, int64_t slices) const {
    const int64_t length = std::max<int64_t>(1, (problem.vocab + slices - 1) / slices);
    std::vector<RowState<Real>> merged;
    for (int64_t row = 0; row < problem.rows; ++row) {
      merged.push_back(RowState<Real>::empty());
      for (int64_t begin = 0; begin < problem.vocab; begin += length) {
        RowState<Real> state;
        kernels.row_state(problem, row, begin, std::min(problem.vocab, begin + length), &state);
        merged.back().merge(state);
      }
    }
    return merged;
  }
  void gradient(const Problem& problem, Gradient gradient) const {
    for (bool streaming : {true, false}) {
      if (streaming && gradient.out.data == problem.logits.data) continue;
      gradient.streaming_stores = streaming;
      for (int64_t row = 0; row < problem.rows; ++row) kernels.logit_gradient(problem, gradient, row, 0, problem.vocab);
    }
  }
};

template <typename T>
void check_regimes(const CpuKernels& kernels) {
  for (int64_t vocab : {1, 7, 15, 16, 17, 507, 512, 2047, 2048, 2049, 5003})
    check<T>({3, vocab, 1, 0, 0, 0, 0, 1}, Kernels{kernels});
  check<T>({3, 1000, 1, 1, 2, 3, 0, 0.7, 3}, Kernels{kernels});  // every alignment
  check<T>({3, 5003, 4, 0, 0, 5, 0, 1, 1}, Kernels{kernels});    // slices
  check<T>({3, 700, 1, 0, 0, 0, 3, 1.3}, Kernels{kernels});      // softcap and temperature
}

void check_all(const char* name, const CpuKernels& kernels) {
  const int before = failures;
  check_regimes<float>(kernels);
  check_regimes<double>(kernels);
  check_regimes<cuda::bf16>(kernels);
  check_regimes<cuda::f16>(kernels);
  std::printf("%s: %s\n", name, failures == before ? "good" : "FAILED");
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
