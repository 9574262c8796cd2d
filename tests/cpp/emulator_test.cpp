// The emulator itself: barriers, shuffles, both orders, and what it reports as a hang.
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

void count_odd(const int* in, int* out) {
  if (threadIdx.x % 32 == 31) return;  // an exited lane has no vote
  const unsigned votes = __ballot_sync(0x7fffffffu, in[threadIdx.x] % 2);
  if (threadIdx.x % 32 == 0) out[threadIdx.x / 32] = int(votes);
}

void rotate_through_dynamic_shared(const int* in, int* out) {
  TDPO_DYNAMIC_SHARED(int, shared);
  shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x] + int(gridDim.x);
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
    TDPO_LAUNCH(count_odd, 1, 96, nullptr, in.data(), sums.data());
    for (int votes : sums) expect(votes == 0x2aaaaaaa, "a ballot gathers its warp's votes");
    emulator::launch(2, 96, [&] { rotate_through_dynamic_shared(in.data(), out.data()); }, 96 * sizeof(int));
    for (int i = 0; i < 96; ++i) expect(out[i] == (i + 1) % 96 + 2, "dynamic shared memory is the CTA's");
    for (int& value : in) value += 1000;  // or the last kernel's shared memory would do
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
  if (failures == 0) std::puts("emulator_test: all good");
  return failures == 0 ? 0 : 1;
}
