// The launches of the emulated kernels go into the queues of the stand-in runtime (runtime/kernels.cpp).
#include <cstdio>
#include <cstring>
#include <mutex>

#include "cuda_emulator.h"

using Callback = void (*)(void*);
extern "C" {
void virtual_gpu_submit(int device, cudaStream_t, const char* name, Callback run, Callback drop, void* argument);
int virtual_gpu_device();
void virtual_gpu_fail(int error);
}

namespace {

constexpr int kIllegalAddress = 700, kLaunchFailure = 719;

std::mutex one_at_a_time;  // the emulator has one scheduler

emulator::Order order_of_threads() {
  const char* const name = std::getenv("VIRTUAL_GPU_ORDER");
  if (name != nullptr && std::strcmp(name, "descending") == 0) return emulator::Order::descending;
  if (name != nullptr && std::strcmp(name, "random") == 0) return emulator::Order::random;
  return emulator::Order::ascending;
}

void run(const char* name, const std::function<void()>& launch) {
  const std::lock_guard alone(one_at_a_time);
  emulator::order = order_of_threads();
  try {
    launch();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "virtual GPU: %s: %s\n", name, error.what());
    std::fflush(nullptr);
    virtual_gpu_fail(std::strcmp(error.what(), "__trap") == 0 ? kLaunchFailure : kIllegalAddress);
  }
}

void enqueue(cudaStream_t stream, const char* name, std::function<void()> launch) {
  const auto work = new std::function<void()>([=] { run(name, launch); });
  virtual_gpu_submit(
      virtual_gpu_device(), stream, name, [](void* work) { (*static_cast<std::function<void()>*>(work))(); },
      [](void* work) { delete static_cast<std::function<void()>*>(work); }, work);
}

[[maybe_unused]] const auto connected = emulator::enqueue = enqueue;

}  // namespace
