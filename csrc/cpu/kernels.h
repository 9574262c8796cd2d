// The face that the kernels of every instruction set show to the operators.
#pragma once

#include "../problem.h"

namespace tdpo {

struct CpuKernels {
  // The state of entries [begin, end) of one row, written to `state`.
  void (*row_state)(const Problem&, int64_t row, int64_t begin, int64_t end, void* state);
  // dL/dlogits of entries [begin, end) of one row.
  void (*logit_gradient)(const Problem&, const Gradient&, int64_t row, int64_t begin, int64_t end);
};

namespace DEFAULT {
extern const CpuKernels kernels;
}
#if defined(TDPO_X86)
namespace AVX2 {
extern const CpuKernels kernels;
}
namespace AVX512 {
extern const CpuKernels kernels;
}
#endif

}  // namespace tdpo
