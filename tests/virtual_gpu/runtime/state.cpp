// The settings, the errors and the current device.
#include "runtime.h"

namespace virtual_gpu {
namespace {

const char* text(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : nullptr;
}
bool is_on(const char* name) {
  const char* value = text(name);
  return value != nullptr && std::string(value) != "0";
}
size_t number(const char* name, size_t otherwise) {
  const char* value = text(name);
  return value == nullptr ? otherwise : std::strtoull(value, nullptr, 10);
}
FILE* opened(const char* path) {
  FILE* file = path == nullptr ? nullptr : std::fopen(path, "a");
  if (file != nullptr) std::setvbuf(file, nullptr, _IOLBF, 0);
  return file;
}

int kernel_error = 0, seen_error = 0;
thread_local int own_error = 0;

}  // namespace

const Settings& settings() {
  static const Settings read{
      .devices = static_cast<int>(number("VIRTUAL_GPU_DEVICES", 1)),
      .multiprocessors = static_cast<int>(number("VIRTUAL_GPU_MULTIPROCESSORS", 132)),
      .memory = number("VIRTUAL_GPU_MEMORY", size_t(8) << 30),
      .late = is_on("VIRTUAL_GPU_LATE"),
      .poison = is_on("VIRTUAL_GPU_POISON"),
      .guard = is_on("VIRTUAL_GPU_GUARD"),
      .log = opened(text("VIRTUAL_GPU_LOG")),
  };
  return read;
}

thread_local int current_device = 0;

cudaError_t fail(int error) {
  own_error = error;
  return static_cast<cudaError_t>(error);
}
void fail_in_kernel(int error) {
  if (kernel_error == 0) kernel_error = error;
}
cudaError_t sticky_error() { return seen_error == 0 ? cudaSuccess : fail(seen_error); }
cudaError_t sticky_error_after_synchronisation() {
  if (kernel_error != 0) seen_error = kernel_error;
  return sticky_error();
}
cudaError_t last_error(bool forget) {
  const int error = own_error;
  if (forget) own_error = seen_error;
  return static_cast<cudaError_t>(error);
}
void forget_errors() { kernel_error = seen_error = own_error = 0; }

}  // namespace virtual_gpu

using namespace virtual_gpu;

VIRTUAL_GPU_EXPORT cudaError_t cudaGetLastError() { return last_error(true); }
VIRTUAL_GPU_EXPORT cudaError_t cudaPeekAtLastError() { return last_error(false); }
VIRTUAL_GPU_EXPORT const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorNotReady:
      return "device not ready";
    default:
      return "an error of the virtual GPU";
  }
}
VIRTUAL_GPU_EXPORT const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
