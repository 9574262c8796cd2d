// The Python module: how this binary was built, for bug reports and for `tdpo_ext.build_info()`. CMake defines the
// macros. The operators register themselves with torch when the module is loaded (ops.cpp). This file sees none of
// torch's headers, which hold a pybind11 of their own (CMakeLists.txt).
#include <pybind11/pybind11.h>

#include "cpu/capability.h"

namespace tdpo {
namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = TDPO_VERSION;
  info["torch_built_with"] = TDPO_TORCH_VERSION;
  info["torch_oldest"] = TDPO_OLDEST_TORCH;
  info["compiler"] = TDPO_COMPILER;
  info["cpu_capability"] = name_of(cpu_capability());
  info["cuda_archs"] = TDPO_CUDA_ARCHS;
  return info;
}

}  // namespace
}  // namespace tdpo

PYBIND11_MODULE(_C, m) { m.def("build_info", &tdpo::build_info); }
