// A CUDA runtime for machines without a GPU: what its files share.
//
// Device memory is host memory. Kernels of torch do nothing when they are launched: virtual_gpu.aten does their work,
// and the emulated kernels (../emulated_kernels.cpp) and copies do their own. All of that is work in the queue of a
// stream: it runs at once, or, where streams run late, when a synchronisation asks for it, or when a graph is replayed.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

// Of the runtime's interface.
#define VIRTUAL_GPU_EXPORT extern "C" __attribute__((visibility("default")))

namespace virtual_gpu {

// The switches, which virtual_gpu/settings.py documents.
struct Settings {
  int devices, multiprocessors;
  size_t memory;
  bool late, poison, guard;
  FILE* log;
};
const Settings& settings();

// A line of the log, if there is one.
template <typename... Parts>
void log(const char* format, Parts... parts) {
  if (settings().log != nullptr) std::fprintf(settings().log, format, parts...);
}

// ---- errors ----

// Ends a call with an error that is this thread's last.
cudaError_t fail(int error);
// A kernel's error stays: every later call returns it once a synchronisation has seen it.
void fail_in_kernel(int error);
cudaError_t sticky_error();
cudaError_t sticky_error_after_synchronisation();
cudaError_t last_error(bool forget);
void forget_errors();

// ---- devices ----

extern thread_local int current_device;

// The current device for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(int device) : before_(std::exchange(current_device, device)) {}
  ~OnDevice() { current_device = before_; }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_;
};

// ---- work and streams ----

struct StreamId {
  int device;
  cudaStream_t handle;  // null for the default stream
  auto operator<=>(const StreamId&) const = default;
};
// A stream's id; without a device of its own it is the current one's.
StreamId id_of(cudaStream_t);
cudaStream_t new_stream();

struct Work {
  std::string name;
  std::function<void()> run;
};

struct Graph {
  std::vector<std::shared_ptr<Work>> works;
  uint64_t id;
};

// Counts its records: it is done where the last of them has been reached.
struct Event {
  uint64_t recorded = 0, done = 0;
  StreamId stream{};
  Graph* graph = nullptr;  // that is captured where it was recorded
  int queries = 0;
};

void submit(cudaStream_t, std::string name, std::function<void()> run);
void submit_again(cudaStream_t, const std::shared_ptr<Work>&);
void submit_record(cudaStream_t, Event&);
void submit_wait(cudaStream_t, Event&);
// Runs what a stream holds, all of it or until an event's last record.
void run(StreamId);
void run_until(Event&);
void run_all();
// Whether a stream has nothing to run; an asker that waits makes it run.
bool is_idle(StreamId);
// True while this thread runs work, which may free memory.
bool is_running();

// ---- capture ----

Graph* graph_of(cudaStream_t);
void set_graph(cudaStream_t, Graph*);
Graph* end_capture(cudaStream_t);
bool is_capturing(cudaStream_t);
bool is_capturing_anywhere();
// The error of a synchronisation while a graph is captured.
cudaError_t refuse_in_capture(const char* what);

// ---- memory ----

enum class Place { pageable, pinned, device };
Place place_of(const void*);
// The device of an address; -1 for others.
int device_of(const void*);
void free_what_works_freed();

}  // namespace virtual_gpu
