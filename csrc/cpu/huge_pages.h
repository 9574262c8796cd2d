// Fresh memory by the huge page: at 4 KiB a fault, a tensor as large as the logits costs more to touch than to compute.
#pragma once

#include <ATen/ATen.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tdpo {

inline void prefer_huge_pages(const at::Tensor& fresh) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const auto first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const auto last = (begin + fresh.nbytes()) / kHugePage * kHugePage;
  // A hint: where the system declines it, memory works as before.
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace tdpo
