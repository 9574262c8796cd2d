// What the devices are: H100s by their properties.
#include <cstring>

#include "runtime.h"

namespace virtual_gpu {
namespace {

constexpr int kWarp = 32, kMostThreads = 1024, kThreadsOfMultiprocessor = 2048, kSharedMemory = 48 << 10;
constexpr int kSharedMemoryOptIn = 227 << 10, kCapability = 9, kMostBlocks = 2147483647;
#if CUDART_VERSION >= 13000
constexpr int kRelease = 13000;
#else
constexpr int kRelease = 12000;
#endif

}  // namespace
}  // namespace virtual_gpu

using namespace virtual_gpu;

VIRTUAL_GPU_EXPORT cudaError_t cudaGetDeviceCount(int* count) {
  *count = settings().devices;
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= settings().devices) return fail(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "virtual GPU");
  properties->major = kCapability;
  properties->multiProcessorCount = settings().multiprocessors;
  properties->totalGlobalMem = settings().memory;
  properties->warpSize = kWarp;
  properties->maxThreadsPerBlock = kMostThreads;
  properties->maxThreadsPerMultiProcessor = kThreadsOfMultiprocessor;
  properties->maxBlocksPerMultiProcessor = 32;
  properties->sharedMemPerBlock = kSharedMemory;
  properties->sharedMemPerBlockOptin = kSharedMemoryOptIn;
  properties->sharedMemPerMultiprocessor = 228 << 10;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->l2CacheSize = 50 << 20;
  properties->textureAlignment = 512;
  const int threads[] = {kMostThreads, kMostThreads, 64}, blocks[] = {kMostBlocks, 65535, 65535};
  std::memcpy(properties->maxThreadsDim, threads, sizeof threads);
  std::memcpy(properties->maxGridSize, blocks, sizeof blocks);
  return cudaSuccess;
}

VIRTUAL_GPU_EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = settings().multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = kCapability;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = kMostThreads;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = kThreadsOfMultiprocessor;
      break;
    case cudaDevAttrWarpSize:
      *value = kWarp;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kSharedMemory;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kSharedMemoryOptIn;
      break;
    case cudaDevAttrMaxGridDimX:
      *value = kMostBlocks;
      break;
    default:
      *value = 1;
  }
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaDriverGetVersion(int* version) {
  *version = kRelease;
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
VIRTUAL_GPU_EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaDeviceGetPCIBusId(char* text, int bytes, int device) {
  std::snprintf(text, bytes, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}

// ---- the driver, of which torch asks for a few functions ----

VIRTUAL_GPU_EXPORT int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  if (flags != nullptr) *flags = 0;
  if (active != nullptr) *active = 1;
  return 0;
}
VIRTUAL_GPU_EXPORT int cuCtxGetCurrent(void** context) {
  static int only;
  *context = &only;
  return 0;
}

namespace {

int nothing(...) { return 0; }

void* driver_function(const std::string& name) {
  if (name == "cuDevicePrimaryCtxGetState") return reinterpret_cast<void*>(cuDevicePrimaryCtxGetState);
  if (name == "cuCtxGetCurrent") return reinterpret_cast<void*>(cuCtxGetCurrent);
  return reinterpret_cast<void*>(nothing);
}

}  // namespace

VIRTUAL_GPU_EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                                unsigned long long,
                                                                cudaDriverEntryPointQueryResult* result) {
  *function = driver_function(name);
  if (result != nullptr) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
