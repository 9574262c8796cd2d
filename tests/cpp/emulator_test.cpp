// The emulator itself: barriers, shuffles, both thread orders, deadlocks and traps.
#include <numeric>

#include "cuda_emulator.h"

namespace {

int failures = 0;
void expect(bool good, const char* what) {
  if (!good) std::printf("FAILED: %s\n", what), ++failures;
}

void reverse_through_shared(const int* in, int* out) {
  __shared__ int shared[96];
  shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[95 - threadIdx.x];
}

void reverse_without_barrier(const int* in, int* out) {
  __shared__ int shared[96];
  shared[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = shared[95 - threadIdx.x];
}

void warp_sum(const int* in, int* out) {
  int value = in[threadIdx.x];
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
  if (threadIdx.x % 32 == 0) out[threadIdx.x / 32] = value;
}

void mismatched_barriers() {
  if (threadIdx.x < 16)
    __syncthreads();
  else
    __shfl_down_sync(0xffffffffu, 1, 1);
}

template <typename F>
bool throws(F f) {
  try {
    f();
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

}  // namespace

int main() {
  std::vector<int> in(96), out(96), sums(3);
  std::iota(in.begin(), in.end(), 0);
  bool missing_barrier_shows = false;
  for (bool backwards : {false, true}) {
    emulator::backwards = backwards;
    TDPO_LAUNCH(reverse_through_shared, 1, 96, nullptr, in.data(), out.data());
    for (int i = 0; i < 96; ++i) expect(out[i] == 95 - i, "a barrier makes shared memory visible");
    TDPO_LAUNCH(warp_sum, 1, 96, nullptr, in.data(), sums.data());
    expect(sums[0] == 496 && sums[1] == 1520 && sums[2] == 2544, "shuffles stay in their warp");
    for (int& value : in) value += 1000;  // so that shared memory of the launch before would be wrong
    TDPO_LAUNCH(reverse_without_barrier, 1, 96, nullptr, in.data(), out.data());
    for (int i = 0; i < 96; ++i) missing_barrier_shows |= out[i] != 1095 - i;
    for (int& value : in) value -= 1000;
    expect(throws([] { TDPO_LAUNCH(mismatched_barriers, 1, 32, nullptr); }), "mismatched barriers are a deadlock");
    expect(throws([] { TDPO_LAUNCH(__trap, 1, 32, nullptr); }), "a trap ends the launch");
  }
  expect(missing_barrier_shows, "a missing barrier shows");
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = __half2float({uint16_t(bits)});
    if (!std::isnan(value)) expect(__float2half_rn(value).bits == bits, "half survives the round trip");
  }
  if (failures == 0) std::puts("emulator_test: passed");
  return failures == 0 ? 0 : 1;
}
