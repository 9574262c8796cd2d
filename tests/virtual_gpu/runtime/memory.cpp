// Device memory and copies.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "runtime.h"

namespace virtual_gpu {
namespace {

constexpr size_t kPage = 4096, kAlignment = 16, kMostPoisoned = size_t(1) << 30;
constexpr unsigned char kPastTheEnd = 0xa5;

struct Block {
  size_t bytes;
  int device;
  char* mapped = nullptr;
  size_t mapped_bytes = 0;
};
using Blocks = std::map<char*, Block>;

std::recursive_mutex mutex;  // of all below
using Locked = std::lock_guard<std::recursive_mutex>;
Blocks device_blocks, pinned_blocks;
std::map<int, size_t> used;  // of each device
std::vector<void*> freed_by_works;

size_t rounded_up(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

const Block* find(const Blocks& blocks, const void* pointer) {
  auto* const address = static_cast<char*>(const_cast<void*>(pointer));
  auto after = blocks.upper_bound(address);
  if (after == blocks.begin()) return nullptr;
  const auto& [first, block] = *--after;
  return address < first + block.bytes ? &block : nullptr;
}

// A mapping that holds `bytes` at the end of its pages, between two that no one may touch.
char* between_guards(char* mapped, size_t body, size_t bytes) {
  mprotect(mapped, kPage, PROT_NONE);
  mprotect(mapped + kPage + body, kPage, PROT_NONE);
  char* const data = mapped + kPage + body - rounded_up(bytes, kAlignment);
  std::memset(data + bytes, kPastTheEnd, rounded_up(bytes, kAlignment) - bytes);
  return data;
}

void check_past_the_end(const char* data, const Block& block) {
  const auto* end = reinterpret_cast<const unsigned char*>(data + block.bytes);
  const auto* last = reinterpret_cast<const unsigned char*>(data + rounded_up(block.bytes, kAlignment));
  if (std::all_of(end, last, [](unsigned char byte) { return byte == kPastTheEnd; })) return;
  std::fprintf(stderr, "virtual GPU: a write past the end of %zu bytes\n", block.bytes);
  fail_in_kernel(cudaErrorIllegalAddress);
}

bool matches(cudaMemcpyKind kind, Place to, Place from) {
  const bool to_device = to == Place::device, from_device = from == Place::device;
  switch (kind) {
    case cudaMemcpyHostToDevice:
      return to_device && !from_device;
    case cudaMemcpyDeviceToHost:
      return !to_device && from_device;
    case cudaMemcpyDeviceToDevice:
      return to_device && from_device;
    default:
      return true;
  }
}

}  // namespace

Place place_of(const void* pointer) {
  const Locked locked(mutex);
  if (find(device_blocks, pointer) != nullptr) return Place::device;
  return find(pinned_blocks, pointer) != nullptr ? Place::pinned : Place::pageable;
}
int device_of(const void* pointer) {
  const Locked locked(mutex);
  const Block* const block = find(device_blocks, pointer);
  return block == nullptr ? -1 : block->device;
}
void free_what_works_freed() {
  std::vector<void*> freed;
  {
    const Locked locked(mutex);
    freed.swap(freed_by_works);
  }
  for (void* pointer : freed) cudaFree(pointer);
}

}  // namespace virtual_gpu

using namespace virtual_gpu;

VIRTUAL_GPU_EXPORT cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  const Locked locked(mutex);
  *pointer = nullptr;
  if (sticky_error() != cudaSuccess) return sticky_error();
  if (used[current_device] + bytes > settings().memory) return fail(cudaErrorMemoryAllocation);
  const size_t body = rounded_up(std::max<size_t>(bytes, 1), kPage);
  const size_t mapped_bytes = body + (settings().guard ? 2 * kPage : 0);
  void* const mapping =
      mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  auto* const mapped = static_cast<char*>(mapping);
  char* const data = settings().guard ? between_guards(mapped, body, bytes) : mapped;
  if (settings().poison && bytes <= kMostPoisoned) std::memset(data, 0xff, bytes);
  device_blocks[data] = {bytes, current_device, mapped, mapped_bytes};
  used[current_device] += bytes;
  *pointer = data;
  log("ALLOCATION %zu device=%d\n", bytes, current_device);
  return cudaSuccess;
}

VIRTUAL_GPU_EXPORT cudaError_t cudaFree(void* pointer) {
  if (pointer == nullptr) return cudaSuccess;
  if (is_running()) {  // what frees it may still use it
    const Locked locked(mutex);
    freed_by_works.push_back(pointer);
    return cudaSuccess;
  }
  if (!is_capturing_anywhere()) run_all();
  const Locked locked(mutex);
  const auto found = device_blocks.find(static_cast<char*>(pointer));
  if (found == device_blocks.end()) return fail(cudaErrorInvalidValue);
  const auto& [data, block] = *found;
  if (settings().guard) {
    check_past_the_end(data, block);
    madvise(block.mapped, block.mapped_bytes, MADV_DONTNEED);
    mprotect(block.mapped, block.mapped_bytes, PROT_NONE);  // never used again: a late access ends the process
  } else {
    munmap(block.mapped, block.mapped_bytes);
  }
  used[block.device] -= block.bytes;
  device_blocks.erase(found);
  return cudaSuccess;
}

VIRTUAL_GPU_EXPORT cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const Locked locked(mutex);
  *total = settings().memory;
  *free = *total - used[current_device];
  return cudaSuccess;
}

VIRTUAL_GPU_EXPORT cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  const Locked locked(mutex);
  *pointer = std::aligned_alloc(kPage, rounded_up(std::max<size_t>(bytes, 1), kPage));
  std::memset(*pointer, settings().poison ? 0xff : 0, bytes);
  pinned_blocks[static_cast<char*>(*pointer)] = {bytes, current_device};
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaFreeHost(void* pointer) {
  run_all();
  const Locked locked(mutex);
  pinned_blocks.erase(static_cast<char*>(pointer));
  std::free(pointer);
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  const Locked locked(mutex);
  pinned_blocks[static_cast<char*>(pointer)] = {bytes, current_device};
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaHostUnregister(void* pointer) {
  const Locked locked(mutex);
  pinned_blocks.erase(static_cast<char*>(pointer));
  return cudaSuccess;
}
VIRTUAL_GPU_EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const Locked locked(mutex);
  *attributes = {};
  attributes->type = cudaMemoryTypeUnregistered;
  if (const Block* const block = find(device_blocks, pointer)) {
    attributes->type = cudaMemoryTypeDevice;
    attributes->device = block->device;
    attributes->devicePointer = const_cast<void*>(pointer);
  } else if (const Block* const pinned = find(pinned_blocks, pointer)) {
    attributes->type = cudaMemoryTypeHost;
    attributes->device = pinned->device;
    attributes->hostPointer = attributes->devicePointer = const_cast<void*>(pointer);
  }
  return cudaSuccess;
}

// ---- copies ----

VIRTUAL_GPU_EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                               cudaStream_t stream) {
  log("COPY kind=%d bytes=%zu stream=%p device=%d\n", static_cast<int>(kind), bytes, static_cast<void*>(stream),
      current_device);
  if (sticky_error() != cudaSuccess) return sticky_error();
  if (bytes == 0) return cudaSuccess;
  const Place source = place_of(from), target = place_of(to);
  if (!matches(kind, target, source)) {
    std::fprintf(stderr, "virtual GPU: a copy between other kinds of memory than it says\n");
    return fail(cudaErrorInvalidValue);
  }
  if (source == Place::pageable) {  // is staged before the call returns
    auto* const first = static_cast<const char*>(from);
    const auto staged = std::make_shared<std::vector<char>>(first, first + bytes);
    submit(stream, "copy", [=] { std::memcpy(to, staged->data(), bytes); });
    return cudaSuccess;
  }
  submit(stream, "copy", [=] { std::memmove(to, from, bytes); });
  if (target != Place::pageable) return cudaSuccess;
  log("SYNCHRONISATION copy\n");
  if (is_capturing(stream)) return refuse_in_capture("copy");
  run(id_of(stream));
  return sticky_error_after_synchronisation();
}

VIRTUAL_GPU_EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  log("SYNCHRONISATION copy\n");
  if (is_capturing_anywhere()) return refuse_in_capture("copy");
  run(id_of(nullptr));
  std::memmove(to, from, bytes);
  return sticky_error_after_synchronisation();
}

VIRTUAL_GPU_EXPORT cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                                                 size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
  submit(stream, "copy", [=] {
    for (size_t row = 0; row < height; ++row)
      std::memmove(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
  });
  run(id_of(stream));  // the memory of the host may be pageable
  return cudaSuccess;
}

VIRTUAL_GPU_EXPORT cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes,
                                                   cudaStream_t stream) {
  submit(stream, "copy", [=] { std::memmove(to, from, bytes); });
  return cudaSuccess;
}

VIRTUAL_GPU_EXPORT cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  log("FILL bytes=%zu stream=%p device=%d\n", bytes, static_cast<void*>(stream), current_device);
  submit(stream, "fill", [=] { std::memset(to, value, bytes); });
  return sticky_error();
}
VIRTUAL_GPU_EXPORT cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return cudaMemsetAsync(to, value, bytes, nullptr);
}
