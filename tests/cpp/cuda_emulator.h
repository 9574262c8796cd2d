// Runs CUDA kernels on the CPU, one fiber per CUDA thread, so that the real device code is tested without a GPU.
//
// The threads of a CTA are ucontext fibers that a scheduler resumes in turn, forwards or backwards. __syncthreads and
// warp shuffles park a fiber until its CTA or warp has arrived. When every fiber is parked and none can be released,
// the kernel would hang on a GPU, and the emulator throws. CTAs run one after another, so __shared__ is a static
// variable. This finds wrong indices, missing or mismatched barriers and dependence on the order of threads; it does
// not find races between two barriers that happen to give the right result in both orders.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
using cudaStream_t = void*;

struct EmulatedIndex {
  unsigned x = 0;
};
inline EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

enum class Parked { no, at_block_barrier, at_warp_barrier, finished };

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(128 << 10);
  Parked parked = Parked::no;
};

inline bool backwards = false;  // the order in which fibers are resumed
inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline const std::function<void()>* kernel = nullptr;
inline std::string trap;
inline uint64_t warp_values[64][32];

inline void park(Parked where) {
  auto& thread = threads[threadIdx.x];
  thread.parked = where;
  swapcontext(&thread.context, &scheduler);
}

inline void thread_main() {
  (*kernel)();
  park(Parked::finished);
}

// Releases threads [first, last) if all of them that have not finished are parked at `where`.
inline bool release(size_t first, size_t last, Parked where) {
  bool any = false;
  for (size_t i = first; i < last; ++i) {
    if (threads[i].parked == Parked::finished) continue;
    if (threads[i].parked != where) return false;
    any = true;
  }
  for (size_t i = first; any && i < last; ++i)
    if (threads[i].parked == where) threads[i].parked = Parked::no;
  return any;
}

inline void run_block(unsigned block_threads) {
  threads.resize(block_threads);
  for (unsigned i = 0; i < block_threads; ++i) {
    auto& thread = threads[i];
    thread.parked = Parked::no;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    makecontext(&thread.context, thread_main, 0);
  }
  while (true) {
    bool ran = false;
    for (unsigned i = 0; i < block_threads; ++i) {
      const unsigned at = backwards ? block_threads - 1 - i : i;
      if (threads[at].parked != Parked::no) continue;
      ran = true;
      threadIdx.x = at;
      swapcontext(&scheduler, &threads[at].context);
      if (!trap.empty()) throw std::runtime_error(trap);
    }
    bool released = false, alive = false;
    for (unsigned warp = 0; warp < block_threads; warp += 32)
      released |= release(warp, std::min(warp + 32, block_threads), Parked::at_warp_barrier);
    if (!released) released = release(0, block_threads, Parked::at_block_barrier);
    for (const auto& thread : threads) alive |= thread.parked != Parked::finished;
    if (!alive) return;
    if (!ran && !released) throw std::runtime_error("deadlock: threads wait at different barriers");
  }
}

template <typename F>
void launch(unsigned grid, unsigned block, const F& body) {
  const std::function<void()> call = body;
  kernel = &call;
  trap.clear();
  blockDim.x = block;
  gridDim.x = grid;
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) run_block(block);
  kernel = nullptr;
}

}  // namespace emulator

#define TDPO_LAUNCH(kernel_name, grid, block, stream, ...) \
  ((void)(stream), emulator::launch(grid, block, [&] { kernel_name(__VA_ARGS__); }))

inline void __syncthreads() { emulator::park(emulator::Parked::at_block_barrier); }

template <typename T>
T __shfl_down_sync(unsigned, T value, int distance) {
  static_assert(sizeof(T) <= 8);
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  std::memcpy(&emulator::warp_values[warp][lane], &value, sizeof(T));
  emulator::park(emulator::Parked::at_warp_barrier);
  if (lane + distance < 32) std::memcpy(&value, &emulator::warp_values[warp][lane + distance], sizeof(T));
  emulator::park(emulator::Parked::at_warp_barrier);
  return value;
}

inline void __trap() {
  emulator::trap = "__trap";
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
