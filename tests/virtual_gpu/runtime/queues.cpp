// The queues of the streams.
#include <dlfcn.h>

#include <algorithm>
#include <deque>
#include <map>

#include "runtime.h"

namespace virtual_gpu {
namespace {

// Work, a record of an event, or a wait for one.
struct Item {
  std::shared_ptr<Work> work;
  Event* record = nullptr;
  Event* wait = nullptr;
  uint64_t version = 0;  // of the record
};
struct Stream {
  std::deque<Item> items;
  Graph* graph = nullptr;  // that is captured
  int queries = 0;
};

constexpr int kQueriesUntilIdle = 2, kQueriesUntilDone = 1000;

std::recursive_mutex mutex;  // of all below
using Locked = std::lock_guard<std::recursive_mutex>;
auto& streams = *new std::map<StreamId, Stream>;   // never destroyed: work of Python may be left at exit
auto& devices = *new std::map<cudaStream_t, int>;  // of the streams
uintptr_t last_handle = 0x1000;

thread_local int running = 0;

// One thread runs work at a time. One that waits for it gives up Python's lock, which the work may need.
std::recursive_mutex runner;
class Running {
 public:
  Running() {
    if (runner.try_lock()) return;
    static const auto holds_lock = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
    static const auto release = reinterpret_cast<void* (*)()>(dlsym(RTLD_DEFAULT, "PyEval_SaveThread"));
    static const auto take = reinterpret_cast<void (*)(void*)>(dlsym(RTLD_DEFAULT, "PyEval_RestoreThread"));
    if (holds_lock != nullptr && holds_lock()) {
      void* const thread = release();
      runner.lock();
      take(thread);
    } else {
      runner.lock();
    }
  }
  ~Running() { runner.unlock(); }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;
};

void run(StreamId id, Event* until, uint64_t version) {
  const Running alone;
  while (true) {
    Item item;
    {
      const Locked locked(mutex);
      auto& items = streams[id].items;
      if (items.empty() || (until != nullptr && until->done >= version)) return;
      item = std::move(items.front());
      items.pop_front();
    }
    if (item.work) {
      ++running;
      item.work->run();
      item.work = nullptr;
      --running;
    }
    if (item.wait != nullptr && item.wait->done < item.version) run(item.wait->stream, item.wait, item.version);
    if (item.record != nullptr) {
      const Locked locked(mutex);
      item.record->done = std::max(item.record->done, item.version);
    }
    if (running == 0) free_what_works_freed();
  }
}

void push(cudaStream_t handle, Item item) {
  StreamId id;
  {
    const Locked locked(mutex);
    id = id_of(handle);
    auto& stream = streams[id];
    if (stream.graph != nullptr) {
      if (item.work) stream.graph->works.push_back(item.work);
      return;
    }
    stream.items.push_back(std::move(item));
    stream.queries = 0;
  }
  if (!settings().late) run(id);
}

}  // namespace

StreamId id_of(cudaStream_t handle) {
  const Locked locked(mutex);
  if (reinterpret_cast<uintptr_t>(handle) <= 2) return {current_device, nullptr};  // the default stream's three names
  const auto found = devices.find(handle);
  return {found == devices.end() ? current_device : found->second, handle};
}

cudaStream_t new_stream() {
  const Locked locked(mutex);
  const auto handle = reinterpret_cast<cudaStream_t>(last_handle += 16);
  devices[handle] = current_device;
  return handle;
}

void submit(cudaStream_t stream, std::string name, std::function<void()> run) {
  submit_again(stream, std::make_shared<Work>(Work{std::move(name), std::move(run)}));
}
void submit_again(cudaStream_t stream, const std::shared_ptr<Work>& work) { push(stream, {.work = work}); }

void submit_record(cudaStream_t stream, Event& event) {
  uint64_t version;
  {
    const Locked locked(mutex);
    event.stream = id_of(stream);
    event.graph = streams[event.stream].graph;
    event.queries = 0;
    version = ++event.recorded;
    if (event.graph != nullptr) event.done = version;
  }
  if (event.graph == nullptr) push(stream, {.record = &event, .version = version});
}

void submit_wait(cudaStream_t stream, Event& event) {
  if (event.recorded > 0) push(stream, {.wait = &event, .version = event.recorded});
}

void run(StreamId id) { run(id, nullptr, 0); }
void run_until(Event& event) {
  if (event.done < event.recorded) run(event.stream, &event, event.recorded);
}
void run_all() {
  std::vector<StreamId> ids;
  {
    const Locked locked(mutex);
    for (auto& [id, stream] : streams) ids.push_back(id);
  }
  for (const auto id : ids) run(id);
}

bool is_idle(StreamId id) {
  const Locked locked(mutex);
  auto& stream = streams[id];
  return stream.items.empty() || stream.queries++ >= kQueriesUntilIdle;
}
bool is_running() { return running > 0; }

Graph* graph_of(cudaStream_t stream) {
  const Locked locked(mutex);
  return streams[id_of(stream)].graph;
}
void set_graph(cudaStream_t stream, Graph* graph) {
  const Locked locked(mutex);
  streams[id_of(stream)].graph = graph;
}
Graph* end_capture(cudaStream_t stream) {
  const Locked locked(mutex);
  Graph* const graph = graph_of(stream);
  for (auto& [id, other] : streams)
    if (other.graph == graph) other.graph = nullptr;
  return graph;
}
bool is_capturing(cudaStream_t stream) { return graph_of(stream) != nullptr; }
bool is_capturing_anywhere() {
  const Locked locked(mutex);
  return std::any_of(streams.begin(), streams.end(), [](auto& entry) { return entry.second.graph != nullptr; });
}
cudaError_t refuse_in_capture(const char* what) {
  log("SYNCHRONISATION IN CAPTURE %s\n", what);
  return fail(cudaErrorStreamCaptureUnsupported);
}

}  // namespace virtual_gpu

using namespace virtual_gpu;

// ---- streams ----

VIRTUAL_GPU_EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  *stream = new_stream();
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
VIRTUAL_GPU_EXPORT cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  run(id_of(stream));
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0, *greatest = -5;
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  log("SYNCHRONISATION stream\n");
  if (is_capturing(stream)) return refuse_in_capture("stream");
  run(id_of(stream));
  return sticky_error_after_synchronisation();
}
VIRTUAL_GPU_EXPORT cudaError_t cudaDeviceSynchronize() {
  log("SYNCHRONISATION device\n");
  if (is_capturing_anywhere()) return refuse_in_capture("device");
  run_all();
  return sticky_error_after_synchronisation();
}
VIRTUAL_GPU_EXPORT cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (is_capturing(stream)) return refuse_in_capture("query");
  if (!is_idle(id_of(stream))) return cudaErrorNotReady;
  run(id_of(stream));
  return sticky_error_after_synchronisation();
}
VIRTUAL_GPU_EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data,
                                                     unsigned) {
  submit(stream, "callback", [=] { callback(stream, cudaSuccess, data); });
  return cudaSuccess;
}

// ---- events ----

VIRTUAL_GPU_EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
VIRTUAL_GPU_EXPORT cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }  // queues may still name it
VIRTUAL_GPU_EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  submit_record(stream, *reinterpret_cast<Event*>(event));
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
VIRTUAL_GPU_EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t handle, unsigned) {
  auto& event = *reinterpret_cast<Event*>(handle);
  if (event.graph != nullptr) {
    set_graph(stream, event.graph);  // the stream joins the capture
    return cudaSuccess;
  }
  if (is_capturing(stream)) return fail(cudaErrorStreamCaptureIsolation);
  submit_wait(stream, event);
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  log("SYNCHRONISATION event\n");
  auto& event = *reinterpret_cast<Event*>(handle);
  if (event.graph != nullptr) return refuse_in_capture("event");
  run_until(event);
  return sticky_error_after_synchronisation();
}
VIRTUAL_GPU_EXPORT cudaError_t cudaEventQuery(cudaEvent_t handle) {
  auto& event = *reinterpret_cast<Event*>(handle);
  if (event.done < event.recorded && event.queries++ < kQueriesUntilDone) return cudaErrorNotReady;
  run_until(event);
  return sticky_error_after_synchronisation();
}
VIRTUAL_GPU_EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}
