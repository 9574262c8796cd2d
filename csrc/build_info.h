// How this binary was built, for bug reports and for `tdpo_ext.build_info()`. CMake defines the macros.
#pragma once

#include <ATen/Version.h>
#include <pybind11/pybind11.h>

namespace tdpo {

inline pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = TDPO_VERSION;
  info["torch_built_with"] = TDPO_TORCH_VERSION;
  info["compiler"] = TDPO_COMPILER;
  info["cpu_capability"] = at::get_cpu_capability();
  info["cuda_archs"] = TDPO_CUDA_ARCHS;
  return info;
}

}  // namespace tdpo
