// The instruction set of the CPU kernels, chosen once at run time. The rules are torch's own: the best that the
// processor has, or less where ATEN_CPU_CAPABILITY says so. No torch here.
#pragma once

#include <cstdlib>
#include <string_view>

namespace tdpo {

enum class CpuCapability { baseline, avx2, avx512 };

inline const char* name_of(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::avx512:
      return "AVX512";
    case CpuCapability::avx2:
      return "AVX2";
    case CpuCapability::baseline:
      break;
  }
  return "DEFAULT";
}

// The best instruction set of this processor for which there are kernels.
inline CpuCapability processor_capability() {
#if defined(TDPO_X86)
  // Every processor with AVX2 also converts float16 (F16C), which older compilers cannot ask for.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CpuCapability::baseline;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return CpuCapability::avx512;
  return CpuCapability::avx2;
#else
  return CpuCapability::baseline;
#endif
}

// The best that ATEN_CPU_CAPABILITY allows. torch itself warns of values that it does not know.
inline CpuCapability allowed_capability() {
  const char* const setting = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view allowed = setting == nullptr ? "" : setting;
  if (allowed == "default") return CpuCapability::baseline;
  if (allowed == "avx2") return CpuCapability::avx2;
  return CpuCapability::avx512;
}

inline CpuCapability cpu_capability() {
  static const CpuCapability chosen = [] {
    const auto processor = processor_capability(), allowed = allowed_capability();
    return allowed < processor ? allowed : processor;
  }();
  return chosen;
}

}  // namespace tdpo
