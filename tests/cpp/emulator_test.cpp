// The emulator itself: barriers, shuffles, thread orders, shared memory, deadlocks and traps.
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

void shuffle_in_two_branches() {
  if (threadIdx.x < 16)
    __shfl_down_sync(0xffffffffu, 1, 1);
  else
    __shfl_down_sync(0xffffffffu, 1, 1);
}

void barriers_in_two_branches() {
  if (threadIdx.x < 16)
    __syncthreads();
  else
    __syncthreads();
}

void shuffle_outside_of_the_mask() { __shfl_down_sync(0x0000ffffu, 1, 1); }

void shuffle_from_outside_of_the_mask(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_down_sync(0x0000ffffu, 1, 8);
}

void shuffle_after_others_left(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1, 8);
}

void read_stale_shared(const int* in, int* out) {
  __shared__ int shared[32];
  if (in != nullptr) shared[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = shared[threadIdx.x];
}

void note_order(std::vector<unsigned>* order) { order->push_back(blockIdx.x * 32 + threadIdx.x); }

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
  std::vector<int> numbers(96), out(96), sums(3);
  std::iota(numbers.begin(), numbers.end(), 0);
  // Launches copy their arguments.
  const int* const in = numbers.data();
  int *const to = out.data(), *const sum = sums.data();
  bool missing_barrier_shows = false;
  std::vector<std::vector<unsigned>> orders;
  using emulator::Order;
  for (auto order : {Order::ascending, Order::descending, Order::random}) {
    emulator::order = order;
    auto* const noted = &orders.emplace_back();
    TDPO_LAUNCH(note_order, 2, 32, nullptr, noted);
    TDPO_LAUNCH(reverse_through_shared, 1, 96, nullptr, in, to);
    for (int i = 0; i < 96; ++i) expect(out[i] == 95 - i, "a barrier makes shared memory visible");
    TDPO_LAUNCH(warp_sum, 1, 96, nullptr, in, sum);
    expect(sums[0] == 496 && sums[1] == 1520 && sums[2] == 2544, "shuffles stay in their warp");
    TDPO_LAUNCH(reverse_without_barrier, 1, 96, nullptr, in, to);
    for (int i = 0; i < 96; ++i) missing_barrier_shows |= out[i] != 95 - i;
    TDPO_LAUNCH(read_stale_shared, 1, 32, nullptr, in, to);
    TDPO_LAUNCH(read_stale_shared, 1, 32, nullptr, nullptr, to);
    expect(out[3] == -1, "shared memory is poisoned between CTAs");
    TDPO_LAUNCH(shuffle_from_outside_of_the_mask, 1, 32, nullptr, to);
    expect(out[7] == 1 && out[8] == -1, "a lane outside of the mask has no value");
    TDPO_LAUNCH(shuffle_after_others_left, 1, 32, nullptr, to);
    expect(out[7] == 1 && out[8] == -1, "a lane that has left has no value");
    expect(throws([] { TDPO_LAUNCH(mismatched_barriers, 1, 32, nullptr); }), "mismatched barriers are a deadlock");
    expect(throws([] { TDPO_LAUNCH(shuffle_in_two_branches, 1, 32, nullptr); }), "a shuffle in two branches shows");
    expect(throws([] { TDPO_LAUNCH(barriers_in_two_branches, 1, 32, nullptr); }), "a barrier in two branches shows");
    expect(throws([] { TDPO_LAUNCH(shuffle_outside_of_the_mask, 1, 32, nullptr); }),
           "a lane outside of the mask shows");
    expect(throws([] { TDPO_LAUNCH(__trap, 1, 32, nullptr); }), "a trap ends the launch");
    expect(emulator::traps == 32, "traps are counted");
  }
  expect(std::is_sorted(orders[0].begin(), orders[0].end()), "ascending order");
  expect(std::is_sorted(orders[1].rbegin(), orders[1].rend()), "descending order");
  expect(orders[2] != orders[0] && orders[2] != orders[1] && orders[2].size() == 64, "random order");
  expect(missing_barrier_shows, "a missing barrier shows");
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = __half2float({uint16_t(bits)});
    if (!std::isnan(value)) expect(__float2half_rn(value).bits == bits, "half survives the round trip");
  }
  if (failures == 0) std::puts("emulator_test: passed");
  return failures == 0 ? 0 : 1;
}
