// Runs CUDA kernels on the CPU, one fiber per CUDA thread, so that the real device code is tested without a GPU: in the
// tests here, which call the launchers, and in the virtual GPU (tests/virtual_gpu), where the operators do.
//
// The threads of a CTA are fibers that a scheduler resumes in ascending, descending or random order; CTAs run one after
// another, in the same kind of order. __syncthreads and warp shuffles park a fiber until its CTA, or the
// lanes of its mask, have arrived at the same place of the source. Where they have not and nothing else can run, or
// where a lane shuffles under a mask that does not name it, the emulator throws. Shared memory is filled with NaN
// before each CTA, and so is what a shuffle reads from a lane that takes no part. This finds wrong indices, missing or
// mismatched barriers, stale shared memory and dependence on the order of threads; it does not find a race between two
// barriers that gives the right result in every order tried. It runs under the address and undefined-behaviour
// sanitizers, which find accesses outside of a buffer and misaligned wide ones.
#pragma once

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__clang__)
// std::source_location needs clang 16.
struct EmulatedLocation {
  unsigned line, column;
  static constexpr EmulatedLocation current(unsigned line = __builtin_LINE(), unsigned column = __builtin_COLUMN()) {
    return {line, column};
  }
};
#else
#include <source_location>
struct EmulatedLocation {
  unsigned line, column;
  static constexpr EmulatedLocation current(std::source_location at = std::source_location::current()) {
    return {at.line(), at.column()};
  }
};
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
// Of the thread: the thread-local memory of the executable, or of the library that holds the kernels, holds nothing
// else, so all of it can be filled before each CTA.
#define __shared__ static thread_local
#define __launch_bounds__(...)
struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct EmulatedIndex {
  unsigned x = 0;
};
inline EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

enum class Order { ascending, descending, random };
enum class Parked { no, at_block_barrier, at_warp_barrier, finished };

// Where a fiber waits: the place of the source, the phase of a shuffle and its mask.
struct Place {
  unsigned line = 0, column = 0, phase = 0;
  uint32_t mask = 0;
  bool operator==(const Place&) const = default;
};

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
// A switch without swapcontext's system call: the threads of a CTA switch hundreds of times each.
struct Fiber {
  void* stack_pointer = nullptr;
};
extern "C" void tdpo_switch_fiber(void** from, void* to);
asm(R"(
.text
.hidden tdpo_switch_fiber
.weak tdpo_switch_fiber
.type tdpo_switch_fiber,@function
tdpo_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
inline void switch_fiber(Fiber& from, Fiber& to) { tdpo_switch_fiber(&from.stack_pointer, to.stack_pointer); }
inline void start_fiber(Fiber& fiber, std::vector<char>& stack, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack.data() + stack.size()) / 16 * 16);
  *--top = nullptr;  // where the entry would return to, which never does
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
}
#else
using Fiber = ucontext_t;
inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from, &to); }
inline void start_fiber(Fiber& fiber, std::vector<char>& stack, void (*entry)()) {
  getcontext(&fiber);
  fiber.uc_stack.ss_sp = stack.data();
  fiber.uc_stack.ss_size = stack.size();
  makecontext(&fiber, entry, 0);
}
#endif

struct Thread {
  Fiber fiber;
  std::vector<char> stack = std::vector<char>(128 << 10);
  Parked parked = Parked::no;
  Place place;
};

inline Order order = Order::ascending;
inline std::mt19937 random;
inline std::vector<Thread> threads;
inline std::deque<unsigned> runnable;
inline Fiber scheduler;
inline const std::function<void()>* kernel = nullptr;
inline int traps = 0;      // of this launch
inline std::string error;  // of a fiber: only the scheduler can throw
inline uint64_t warp_values[64][32];

inline void park(Parked where, Place place = {}) {
  auto& thread = threads[threadIdx.x];
  thread.parked = where;
  thread.place = place;
  switch_fiber(thread.fiber, scheduler);
}

inline void thread_main() {
  (*kernel)();
  park(Parked::finished);
}

// The next of `waiting` in this launch's order.
inline unsigned take(std::deque<unsigned>& waiting) {
  if (order == Order::random) std::swap(waiting.front(), waiting[random() % waiting.size()]);
  const unsigned next = order == Order::descending ? waiting.back() : waiting.front();
  if (order == Order::descending)
    waiting.pop_back();
  else
    waiting.pop_front();
  return next;
}

// Releases threads [first, last) of `mask` if all of them that have not finished wait at `place`.
inline bool release(unsigned first, unsigned last, uint32_t mask, Parked where, const Place& place) {
  const auto takes_part = [&](unsigned i) {
    return (mask >> (i - first) % 32 & 1) && threads[i].parked != Parked::finished;
  };
  for (unsigned i = first; i < last; ++i) {
    if (!takes_part(i)) continue;
    if (threads[i].parked != where) return false;
    if (threads[i].place != place)
      throw std::runtime_error("threads that wait for one another are at different places");
  }
  for (unsigned i = first; i < last; ++i) {
    if (!takes_part(i)) continue;
    threads[i].parked = Parked::no;
    runnable.push_back(i);
  }
  return true;
}

inline bool release_lanes_with(unsigned thread) {
  const auto place = threads[thread].place;
  const unsigned first = thread / 32 * 32;
  return release(first, std::min<unsigned>(first + 32, threads.size()), place.mask, Parked::at_warp_barrier, place);
}

// This thread's copy of the thread-local memory of the executable or library that holds this code: the shared memory.
struct SharedMemory {
  void* data = nullptr;
  size_t bytes = 0;
};
inline thread_local char touched;  // so that the thread has a copy
inline SharedMemory find_shared_memory() {
  touched = 1;
  SharedMemory found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* found) {
        const auto here = reinterpret_cast<uintptr_t>(&find_shared_memory);
        const auto parts = info->dlpi_phdr, end = parts + info->dlpi_phnum;
        const bool holds_this = std::any_of(parts, end, [&](const auto& part) {
          return part.p_type == PT_LOAD && here - (info->dlpi_addr + part.p_vaddr) < part.p_memsz;
        });
        if (!holds_this) return 0;
        const auto part = std::find_if(parts, end, [](const auto& part) { return part.p_type == PT_TLS; });
        *static_cast<SharedMemory*>(found) = {info->dlpi_tls_data, part->p_memsz};
        return 1;
      },
      &found);
  return found;
}
inline SharedMemory shared_memory;  // of the launch that runs

inline void run_block(unsigned block_threads) {
  std::memset(shared_memory.data, 0xff, shared_memory.bytes);  // NaN as a float or a double
  threads.resize(block_threads);
  runnable.clear();
  for (unsigned i = 0; i < block_threads; ++i) {
    auto& thread = threads[i];
    thread.parked = Parked::no;
    runnable.push_back(i);
    start_fiber(thread.fiber, thread.stack, thread_main);
  }
  while (true) {
    while (!runnable.empty()) {
      const unsigned next = take(runnable);
      threadIdx.x = next;
      switch_fiber(scheduler, threads[next].fiber);
      if (!error.empty()) throw std::runtime_error(std::exchange(error, {}));
      if (threads[next].parked == Parked::at_warp_barrier) release_lanes_with(next);
    }
    // Lanes whose peers have finished, then the whole CTA.
    unsigned alive = 0, waiting = 0;
    for (unsigned i = 0; i < block_threads; ++i) {
      if (threads[i].parked == Parked::finished) continue;
      alive = i + 1;
      if (threads[i].parked == Parked::at_warp_barrier) waiting += !release_lanes_with(i);
    }
    if (alive == 0) return;
    if (runnable.empty() &&
        (waiting > 0 || !release(0, block_threads, ~0u, Parked::at_block_barrier, threads[alive - 1].place)))
      throw std::runtime_error("deadlock: threads wait at different barriers");
  }
}

inline void launch(unsigned grid, unsigned block, const std::function<void()>& body) {
  shared_memory = find_shared_memory();
  kernel = &body;
  traps = 0;
  blockDim.x = block;
  gridDim.x = grid;
  std::deque<unsigned> blocks;
  for (unsigned i = 0; i < grid; ++i) blocks.push_back(i);
  while (!blocks.empty()) {
    blockIdx.x = take(blocks);
    run_block(block);
  }
  kernel = nullptr;
  if (traps > 0) throw std::runtime_error("__trap");
}

// Where launches go: nowhere, so that they run at once, or into the queue of their stream.
inline void (*enqueue)(cudaStream_t, const char* name, std::function<void()> launch) = nullptr;

inline void launch_on(cudaStream_t stream, const char* name, unsigned grid, unsigned block,
                      std::function<void()> body) {
  if (enqueue == nullptr) return launch(grid, block, body);
  enqueue(stream, name, [=] { launch(grid, block, body); });
}

}  // namespace emulator

#define TDPO_LAUNCH(kernel_name, grid, block, stream, ...) \
  emulator::launch_on(stream, #kernel_name, grid, block, [=] { kernel_name(__VA_ARGS__); })

inline void __syncthreads(EmulatedLocation at = EmulatedLocation::current()) {
  emulator::park(emulator::Parked::at_block_barrier, {.line = at.line, .column = at.column});
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int distance, EmulatedLocation at = EmulatedLocation::current()) {
  static_assert(sizeof(T) <= 8);
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (!(mask >> lane & 1)) {
    emulator::error = "a lane shuffles under a mask that does not name it";
    emulator::park(emulator::Parked::finished);
  }
  const auto wait = [&](unsigned phase) {
    emulator::park(emulator::Parked::at_warp_barrier, {at.line, at.column, phase, mask});
  };
  auto& values = emulator::warp_values[warp];
  std::memcpy(&values[lane], &value, sizeof(T));
  wait(0);
  const unsigned from = lane + distance;
  const auto finished = [&] { return emulator::threads[warp * 32 + from].parked == emulator::Parked::finished; };
  if (from < 32) {
    if (!(mask >> from & 1) || warp * 32 + from >= emulator::threads.size() || finished())
      std::memset(&value, 0xff, sizeof(T));
    else
      std::memcpy(&value, &values[from], sizeof(T));
  }
  wait(1);
  return value;
}

// Ends this thread; the launch throws when the others have ended too.
inline void __trap() {
  ++emulator::traps;
  emulator::park(emulator::Parked::finished);
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t emulated_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// The conversions of cuda_fp16.h and cuda_bf16.h that the kernels use.
struct EmulatedHalf {
  uint16_t bits;
};
inline EmulatedHalf __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(EmulatedHalf value) { return value.bits; }
inline uint16_t __bfloat16_as_ushort(EmulatedHalf value) { return value.bits; }
inline EmulatedHalf __float2bfloat16_rn(float value) {
  if (std::isnan(value)) return {0x7fff};
  const uint32_t bits = emulated_bits(value);
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
inline float __half2float(EmulatedHalf half) {
  const uint32_t magnitude = half.bits & 0x7fffu;
  float value = __uint_as_float(magnitude << 13) * 0x1p112f;
  if (magnitude >= 0x7c00u) value = magnitude > 0x7c00u ? NAN : INFINITY;
  return half.bits & 0x8000u ? -value : value;
}
inline EmulatedHalf __float2half_rn(float value) {
  const auto sign = uint16_t(emulated_bits(value) >> 16 & 0x8000u);
  const float size = std::fabs(value);
  if (std::isnan(value)) return {0x7fff};
  if (size >= 65520.0f) return {uint16_t(sign | 0x7c00u)};
  if (size < 0x1p-14f) return {uint16_t(sign | uint16_t(std::nearbyint(size * 0x1p24f)))};
  const uint32_t bits = emulated_bits(size);
  return {uint16_t(sign | uint16_t((bits + 0xfffu + ((bits >> 13) & 1u) - (112u << 23)) >> 13))};
}
