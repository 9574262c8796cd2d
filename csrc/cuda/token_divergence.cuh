// The device kernels of the row states and of the gradient. Torch-free, and free of logits-sized temporaries: forward
// reads each logit once, backward reads it once and writes the gradient once. Rows are cut into 16-byte packs where
// z (forward) or the gradient (backward) is aligned, with heads and tails entry by entry; what is aligned otherwise is
// moved by entries. A thread loads kBatch packs of both rows before it touches the first.
//
// A group of threads, a warp for short rows and a CTA for long ones, takes one slice of one row. Where a row is split
// over several groups each leaves the state of its slice, and merge_kernel merges them in a fixed order. There are no
// atomics, so results are bitwise repeatable. Row offsets are 64-bit; within a slice 32 bits are enough.
#pragma once

#include <type_traits>

#include "device.h"

namespace tdpo::cuda {

constexpr int kThreads = 256;
constexpr int kBatch = 2;
// CTAs of a multiprocessor, for which registers are to suffice.
constexpr int kResidentBlocks = 3;

// ---- device helpers ----

template <typename Real, bool kSoftcap>
struct Cap {
  Real softcap;
  explicit __device__ Cap(const Problem& problem) : softcap(Real(problem.softcap)) {}
  __device__ __forceinline__ Real operator()(Real x) const { return kSoftcap ? softcap * tanh(x / softcap) : x; }
  // d capped / d x, from the capped value
  __device__ __forceinline__ Real slope(Real capped) const {
    return kSoftcap ? Real(1) - (capped / softcap) * (capped / softcap) : Real(1);
  }
};

// Which part of which row a group of kGroup threads takes.
template <int kGroup>
struct Part {
  int64_t row, index, begin;
  int lane, count;

  // Parts are `length` entries long, `parts` of them to a row.
  __device__ Part(const Problem& problem, int64_t parts, int64_t length) : lane(threadIdx.x % kGroup) {
    const int64_t task = int64_t(blockIdx.x) * (kThreads / kGroup) + threadIdx.x / kGroup;
    row = task / parts;
    index = task % parts;
    begin = index * length;
    const int64_t left = problem.vocab - begin;
    count = int(left < 0 ? 0 : (length < left ? length : left));
  }
};

// A row's entries cut into a head, packs and a tail, and shared among the lanes of a group: f(entry) for entries of
// head and tail, f_packs(first entry, batch) for packs, batch being a compile-time number.
template <int kGroup, int kPack, typename F, typename G>
__device__ __forceinline__ void for_entries(uintptr_t address, int size, int count, int lane, F f, G f_packs) {
  const int bytes = kPack * size;
  int head = int((bytes - address % bytes) % bytes) / size;
  if (address % size != 0 || head > count) head = count;
  const int packs = (count - head) / kPack;
  for (int v = lane; v < head; v += kGroup) f(v);
  int p = lane;
  for (; p + (kBatch - 1) * kGroup < packs; p += kBatch * kGroup)
    f_packs(head + p * kPack, std::integral_constant<int, kBatch>{});
  for (; p < packs; p += kGroup) f_packs(head + p * kPack, std::integral_constant<int, 1>{});
  for (int v = head + packs * kPack + lane; v < count; v += kGroup) f(v);
}

template <typename Real>
__device__ __forceinline__ RowState<Real> shuffled_down(const RowState<Real>& state, int distance) {
  RowState<Real> other;
  const Real* from = reinterpret_cast<const Real*>(&state);
  Real* to = reinterpret_cast<Real*>(&other);
#pragma unroll
  for (int i = 0; i < kRowStateSize; ++i) to[i] = __shfl_down_sync(0xffffffffu, from[i], distance);
  return other;
}

// The merged state of a group's threads, valid in its first lane.
template <int kGroup, typename Real>
__device__ __forceinline__ RowState<Real> merged_over_group(RowState<Real> state) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) state.merge(shuffled_down(state, distance));
  if constexpr (kGroup > kWarp) {
    static_assert(kGroup == kThreads, "a group is a warp or a CTA");
    __shared__ RowState<Real> of_warp[kGroup / kWarp];
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = state;
    __syncthreads();
    if (threadIdx.x == 0)
      for (int other = 1; other < kGroup / kWarp; ++other) state.merge(of_warp[other]);
  }
  return state;
}

__device__ __forceinline__ void check_label(int64_t label, const Problem& problem, int lane) {
  if (label == problem.ignore_index || (label >= 0 && label < problem.vocab_size)) return;
  if (lane == 0)
    printf("tdpo_ext: labels hold %lld; allowed are 0 to %lld and ignore_index\n", (long long)label,
           (long long)problem.vocab_size - 1);
  __trap();
}

// ---- kernels ----

// States (slices, rows): group task = row * slices + slice takes entries [slice * length, (slice + 1) * length).
template <typename T, typename Real, bool kSoftcap, int kGroup>
__global__ void __launch_bounds__(kThreads, sizeof(Real) == 4 ? kResidentBlocks : 1)
    row_state_kernel(Problem problem, Real* states, int64_t slices, int64_t length) {
  constexpr int kPack = Pack<T>::size;
  const Part<kGroup> part(problem, slices, length);
  if (part.row >= problem.rows) return;  // a whole warp, and no barrier is to come where groups are warps
  const int64_t label = problem.labels[part.row];
  auto* const out = reinterpret_cast<RowState<Real>*>(states) + part.index * problem.rows + part.row;
  check_label(label, problem, part.lane);
  if (label == problem.ignore_index) {
    if (part.lane == 0) *out = RowState<Real>::empty();
    return;
  }
  const Cap<Real, kSoftcap> cap(problem);
  const Temper<Real> temper(problem.temperature);
  const T* const z = static_cast<const T*>(problem.logits.data) + problem.logits.offset(part.row) + part.begin;
  const T* const r = static_cast<const T*>(problem.ref_logits.data) + problem.ref_logits.offset(part.row) + part.begin;
  const bool r_aligned = reinterpret_cast<uintptr_t>(z) % 16 == reinterpret_cast<uintptr_t>(r) % 16;

  auto state = RowState<Real>::empty();
  const auto add_entry = [&](int v) { state.update(cap(to_real(z[v])), cap(to_real(r[v])), temper); };
  const auto add_packs = [&](int v, auto batch) {
    Pack<T> z_pack[batch()], r_pack[batch()];
#pragma unroll
    for (int b = 0; b < batch(); ++b) {
      z_pack[b] = load_pack(z + v + b * kGroup * kPack, true);
      r_pack[b] = load_pack(r + v + b * kGroup * kPack, r_aligned);
    }
    Real z_top = to_real(z_pack[0].entry[0]), r_top = to_real(r_pack[0].entry[0]);
#pragma unroll
    for (int b = 0; b < batch(); ++b) {
      z_top = fmax(z_top, top_of(z_pack[b]));
      r_top = fmax(r_top, top_of(r_pack[b]));
    }
    // One test a batch, rarely true. Capping keeps the order.
    state.raise_maxima(fmax(state.z_max, cap(z_top) * temper.binary), fmax(state.r_max, cap(r_top) * temper.binary));
    const Real z_shift = shift_of(state.z_max), r_shift = shift_of(state.r_max);
#pragma unroll
    for (int b = 0; b < batch(); ++b)
#pragma unroll
      for (int i = 0; i < kPack; ++i)
        state.sums.template add<DeviceMath<Real>>(cap(to_real(z_pack[b].entry[i])), cap(to_real(r_pack[b].entry[i])),
                                                  z_shift, r_shift, temper);
  };
  for_entries<kGroup, kPack>(reinterpret_cast<uintptr_t>(z), sizeof(T), part.count, part.lane, add_entry, add_packs);

  state = merged_over_group<kGroup>(state);
  if (part.lane == 0) {
    const int64_t at = label - problem.vocab_start - part.begin;
    if (at >= 0 && at < part.count) {
      state.z_label = cap(to_real(z[at]));
      state.r_label = cap(to_real(r[at]));
    }
    *out = state;
  }
}

// States (slices, rows) -> (rows): a thread a row, slices in order.
template <typename Real>
__global__ void merge_kernel(const RowState<Real>* states, int64_t slices, int64_t rows, RowState<Real>* merged) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  auto total = RowState<Real>::empty();
  for (int64_t slice = 0; slice < slices; ++slice) total.merge(states[slice * rows + row]);
  merged[row] = total;
}

template <typename Real>
struct ValueOutputs {
  Real *logps, *ref_logps, *kl, *entropy, *correct;
};

template <typename Real>
__global__ void finalize_kernel(const RowState<Real>* states, const int64_t* labels, int64_t rows, int64_t ignore_index,
                                double temperature, ValueOutputs<Real> out) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  TokenValues<Real> values{};
  if (labels[row] != ignore_index) values = states[row].finalize(Temper<Real>(temperature));
  out.logps[row] = values.logp;
  out.ref_logps[row] = values.ref_logp;
  out.kl[row] = values.kl;
  out.entropy[row] = values.entropy;
  out.correct[row] = values.correct;
}

// Group task = row * tiles + tile writes entries [tile * length, (tile + 1) * length). `out` may be the logits
// themselves: a thread reads an entry before it writes it, and no other thread reads it.
template <typename T, typename Real, typename Out, bool kSoftcap, int kGroup>
__global__ void __launch_bounds__(kThreads, sizeof(Real) == 4 ? kResidentBlocks : 1)
    gradient_kernel(Problem problem, Gradient gradient, int64_t tiles, int64_t length) {
  constexpr int kPack = Pack<T>::size;
  using OutPack = Entries<Out, kPack>;
  const Part<kGroup> part(problem, tiles, length);
  if (part.row >= problem.rows) return;
  const T* const z = static_cast<const T*>(problem.logits.data) + problem.logits.offset(part.row) + part.begin;
  const T* const r = static_cast<const T*>(problem.ref_logits.data) + problem.ref_logits.offset(part.row) + part.begin;
  Out* const out = static_cast<Out*>(gradient.out.data) + gradient.out.offset(part.row) + part.begin;
  const auto address = reinterpret_cast<uintptr_t>(out);

  const Real logp_grad = static_cast<const Real*>(gradient.logp_grad)[part.row];
  const Real kl_grad = static_cast<const Real*>(gradient.kl_grad)[part.row];
  const int64_t label = problem.labels[part.row];
  if (label == problem.ignore_index || (logp_grad == Real(0) && kl_grad == Real(0))) {
    const Out zero = Rounded<Out>::of(Real(0));
    const auto clear = [&](int v, auto batch) {
#pragma unroll
      for (int i = 0; i < batch() * kPack; ++i) out[v + i / kPack * kGroup * kPack + i % kPack] = zero;
    };
    for_entries<kGroup, kPack>(address, sizeof(Out), part.count, part.lane, [&](int v) { out[v] = zero; }, clear);
    return;
  }
  const bool reads_reference = kl_grad != Real(0);
  const int64_t label_at = label - problem.vocab_start - part.begin;
  const Cap<Real, kSoftcap> cap(problem);
  const RowGradient<Real> coefficients(static_cast<const RowState<Real>*>(gradient.states)[part.row], logp_grad,
                                       kl_grad, Temper<Real>(problem.temperature));
  const auto dz = [&](T z_raw, T r_raw, int v) {
    const Real z_entry = cap(to_real(z_raw));
    Real value = coefficients.template policy_part<DeviceMath<Real>>(z_entry);
    if (reads_reference) value -= coefficients.template reference_part<DeviceMath<Real>>(cap(to_real(r_raw)));
    if (v == label_at) value += coefficients.label_extra;  // before the one rounding
    return Rounded<Out>::of(value * cap.slope(z_entry));
  };
  const auto write_entry = [&](int v) { out[v] = dz(z[v], reads_reference ? r[v] : z[v], v); };

  // Packs start where the output is aligned.
  const int head = int((sizeof(OutPack) - address % sizeof(OutPack)) % sizeof(OutPack) / sizeof(Out));
  const bool z_aligned = is_aligned(z + head, 16), r_aligned = is_aligned(r + head, 16);
  const auto write_packs = [&](int v, auto batch) {
    Pack<T> z_pack[batch()], r_pack[batch()];
#pragma unroll
    for (int b = 0; b < batch(); ++b) {
      z_pack[b] = load_pack(z + v + b * kGroup * kPack, z_aligned);
      r_pack[b] = reads_reference ? load_pack(r + v + b * kGroup * kPack, r_aligned) : z_pack[b];
    }
#pragma unroll
    for (int b = 0; b < batch(); ++b) {
      const int first = v + b * kGroup * kPack;
      OutPack result;
#pragma unroll
      for (int i = 0; i < kPack; ++i) result.entry[i] = dz(z_pack[b].entry[i], r_pack[b].entry[i], first + i);
      *reinterpret_cast<OutPack*>(out + first) = result;
    }
  };
  for_entries<kGroup, kPack>(address, sizeof(Out), part.count, part.lane, write_entry, write_packs);
}

// tensor *= factor, without touching memory where factor is 1, which the host does not know.
template <typename T, typename Real>
__global__ void scale_kernel(T* data, int64_t count, const Real* factor) {
  const Real by = *factor;
  if (by == Real(1)) return;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step)
    data[i] = Rounded<T>::of(to_real(data[i]) * by);
}

}  // namespace tdpo::cuda
