// Runs CUDA kernels on the CPU, one fiber per CUDA thread, so that the real device code is tested without a GPU.
//
// The threads of a CTA are ucontext fibers that a scheduler resumes in ascending, descending or random order; CTAs run
// one after another, in the same kind of order. __syncthreads and warp shuffles park a fiber until its CTA, or the
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
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
// Of the thread: the executable's thread-local memory holds nothing else, so all of it can be filled before each CTA.
#define __shared__ static thread_local
#define __launch_bounds__(...)
using cudaStream_t = void*;

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

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(128 << 10);
  Parked parked = Parked::no;
  Place place;
};

inline Order order = Order::ascending;
inline std::mt19937 random;
inline std::vector<Thread> threads;
inline std::deque<unsigned> runnable;
inline ucontext_t scheduler;
inline const std::function<void()>* kernel = nullptr;
inline int traps = 0;      // of this launch
inline std::string error;  // of a fiber: only the scheduler can throw
inline uint64_t warp_values[64][32];

inline void park(Parked where, Place place = {}) {
  auto& thread = threads[threadIdx.x];
  thread.parked = where;
  thread.place = place;
  swapcontext(&thread.context, &scheduler);
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

// Fills the executable's thread-local memory, which is the shared memory, with ones: NaN as a float or a double.
inline void poison_shared_memory() {
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        for (int i = 0; i < info->dlpi_phnum; ++i)
          if (info->dlpi_phdr[i].p_type == PT_TLS && info->dlpi_tls_data != nullptr)
            std::memset(info->dlpi_tls_data, 0xff, info->dlpi_phdr[i].p_memsz);
        return 1;  // the executable comes first; libraries keep theirs
      },
      nullptr);
}

inline void run_block(unsigned block_threads) {
  poison_shared_memory();
  threads.resize(block_threads);
  runnable.clear();
  for (unsigned i = 0; i < block_threads; ++i) {
    auto& thread = threads[i];
    thread.parked = Parked::no;
    runnable.push_back(i);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    makecontext(&thread.context, thread_main, 0);
  }
  while (true) {
    while (!runnable.empty()) {
      const unsigned next = take(runnable);
      threadIdx.x = next;
      swapcontext(&scheduler, &threads[next].context);
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

template <typename F>
void launch(unsigned grid, unsigned block, const F& body) {
  const std::function<void()> call = body;
  kernel = &call;
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

}  // namespace emulator

#define TDPO_LAUNCH(kernel_name, grid, block, stream, ...) \
  ((void)(stream), emulator::launch(grid, block, [&] { kernel_name(__VA_ARGS__); }))

inline void __syncthreads(std::source_location at = std::source_location::current()) {
  emulator::park(emulator::Parked::at_block_barrier, {.line = at.line(), .column = at.column()});
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int distance, std::source_location at = std::source_location::current()) {
  static_assert(sizeof(T) <= 8);
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (!(mask >> lane & 1)) {
    emulator::error = "a lane shuffles under a mask that does not name it";
    emulator::park(emulator::Parked::finished);
  }
  const auto wait = [&](unsigned phase) {
    emulator::park(emulator::Parked::at_warp_barrier, {at.line(), at.column(), phase, mask});
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
