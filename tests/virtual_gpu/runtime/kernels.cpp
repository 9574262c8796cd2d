// Launches of torch's kernels, which do nothing: virtual_gpu.aten does their work.
#include <map>

#include "runtime.h"

using namespace virtual_gpu;

namespace {

// The names of the kernels by the functions that stand for them on the host. Libraries register theirs as they are
// loaded.
std::map<const void*, std::string>& names() {
  static auto* const known = new std::map<const void*, std::string>;
  return *known;
}

struct Configuration {
  dim3 grid, block;
  size_t shared_memory;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, cudaStream_t stream) {
  const bool empty = grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0;
  if (empty || block.x * block.y * block.z > 1024 || grid.y > 65535 || grid.z > 65535)
    return fail(cudaErrorInvalidConfiguration);
  const auto found = names().find(kernel);
  log("LAUNCH device=%d stream=%p %s\n", current_device, static_cast<void*>(stream),
      found == names().end() ? "?" : found->second.c_str());
  return sticky_error();
}

}  // namespace

VIRTUAL_GPU_EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
VIRTUAL_GPU_EXPORT void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, void*, void*,
                                               void*, void*, int*) {
  names()[kernel] = name;
}
VIRTUAL_GPU_EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_memory,
                                                        cudaStream_t stream) {
  configurations.push_back({grid, block, shared_memory, stream});
  return 0;
}
VIRTUAL_GPU_EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_memory,
                                                          void* stream) {
  const auto last = configurations.back();
  configurations.pop_back();
  *grid = last.grid, *block = last.block, *shared_memory = last.shared_memory;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t,
                                                  cudaStream_t stream) {
  return launch(kernel, grid, block, stream);
}
VIRTUAL_GPU_EXPORT cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t,
                                                cudaStream_t stream) {
  return launch(kernel, grid, block, stream);
}
VIRTUAL_GPU_EXPORT cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t,
                                                           cudaStream_t stream) {
  return launch(kernel, grid, block, stream);
}
VIRTUAL_GPU_EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* configuration, const void* kernel,
                                                   void**) {
  return launch(kernel, configuration->gridDim, configuration->blockDim, configuration->stream);
}
VIRTUAL_GPU_EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int,
                                                                                      size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaGetSymbolAddress(void** address, const void*) {
  static char symbol[1 << 16];
  *address = symbol;
  return cudaSuccess;
}
