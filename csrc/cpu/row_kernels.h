// The CPU row kernels as the operators call them: one table of functions per instruction set.
#pragma once

#include "../params.h"

namespace tdpo {

struct CpuKernels {
  // The state of entries [begin, end) of one row, written to `state`.
  void (*row_state)(const DivergenceParams&, int64_t row, int64_t begin, int64_t end, void* state);
  // dL/dlogits of entries [begin, end) of one row. Streaming stores bypass the cache: for an output that exceeds it and
  // is not read soon.
  void (*logit_gradient)(const DivergenceParams&, const GradientParams&, bool streaming_stores, int64_t row,
                         int64_t begin, int64_t end);
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
