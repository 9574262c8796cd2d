// Whether the compiled kernels register themselves: not where TDPO_KERNELS=torch asks for those in plain torch instead
// (tdpo_ext/ops/torch_kernels.py). Other values are checked in Python (tdpo_ext/ops/_load.py).
#pragma once

#include <cstdlib>
#include <string_view>

namespace tdpo {

inline bool compiled_kernels_are_wanted() {
  const char* wanted = std::getenv("TDPO_KERNELS");
  return wanted == nullptr || std::string_view(wanted) != "torch";
}

}  // namespace tdpo
