// The interface of the emulated kernels (../emulated_kernels.cpp) and of virtual_gpu.queue.
#include "runtime.h"

using namespace virtual_gpu;

using Callback = void (*)(void*);

VIRTUAL_GPU_EXPORT void virtual_gpu_submit(int device, cudaStream_t stream, const char* name, Callback run,
                                           Callback drop, void* argument) {
  const OnDevice guard(device);
  log("WORK device=%d stream=%p %s\n", device, static_cast<void*>(stream), name);
  const std::shared_ptr<void> held(argument, drop);
  submit(stream, name, [=] { run(held.get()); });
}
VIRTUAL_GPU_EXPORT int virtual_gpu_device() { return current_device; }
VIRTUAL_GPU_EXPORT void virtual_gpu_fail(int error) { fail_in_kernel(error); }
// Whether work of a stream waits: it runs late, or its stream captures a graph.
VIRTUAL_GPU_EXPORT int virtual_gpu_waits(int device, cudaStream_t stream) {
  const OnDevice guard(device);
  return settings().late || is_capturing(stream);
}
VIRTUAL_GPU_EXPORT void virtual_gpu_run(int device, cudaStream_t stream) {
  const OnDevice guard(device);
  run(id_of(stream));
}
VIRTUAL_GPU_EXPORT void virtual_gpu_forget_errors() { forget_errors(); }
VIRTUAL_GPU_EXPORT void virtual_gpu_log(const char* line) { log("%s\n", line); }
