// The device kernels of row states and gradients. Torch-free, and without logits-sized temporaries: forward reads each
// logit once; backward reads it once and writes the gradient once. Rows are processed in 16-byte packs, starting where
// z (forward) or the gradient (backward) is aligned; the head before and the tail after go entry by entry, and so do
// loads from a row that is aligned differently. Each thread loads kBatch packs of both rows per iteration.
//
// A group of threads (a warp for short rows, a CTA for long ones) processes one slice of one row. When a row is split
// over several groups, each writes the state of its slice and merge_kernel merges them in a fixed order. There are no
// atomics, so results are bitwise repeatable. Row offsets are 64-bit; within a slice 32 bits are enough.
#pragma once

#include <type_traits>

#include "device.h"

namespace tdpo::cuda {

constexpr int kThreads = 256;
constexpr int kBatch = 2;
// CTAs per multiprocessor that the register budget must allow.
constexpr int kResidentBlocks = 3;

// ---- device helpers ----

template <typename Real, bool kSoftcap>
struct Cap {
  Real softcap;
  explicit __device__ Cap(const DivergenceParams& params) : softcap(Real(params.softcap)) {}
  __device__ __forceinline__ Real operator()(Real x) const { return kSoftcap ? softcap * tanh(x / softcap) : x; }
  // d(capped)/dx, from the capped value
  __device__ __forceinline__ Real slope(Real capped) const {
    return kSoftcap ? Real(1) - (capped / softcap) * (capped / softcap) : Real(1);
  }
};

// The part of a row that a group of kGroup threads processes.
template <int kGroup>
struct Part {
  int64_t row, index, begin;
  int lane, count;

  // A row has `parts` parts of `length` entries each.
  __device__ Part(const DivergenceParams& params, int64_t parts, int64_t length) : lane(threadIdx.x % kGroup) {
    const int64_t task = int64_t(blockIdx.x) * (kThreads / kGroup) + threadIdx.x / kGroup;
    row = task / parts;
    index = task % parts;
    begin = index * length;
    const int64_t left = params.vocab - begin;
    count = int(left < 0 ? 0 : (length < left ? length : left));
  }
};

// Splits a row's entries into a head, packs and a tail and shares them among the lanes of a group. Calls f(entry) for
// entries of the head and the tail, and f_packs(first entry, batch), with a compile-time batch, for packs.
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
__device__ __forceinline__ RowState<Real> shuffle_down(const RowState<Real>& state, int distance) {
  RowState<Real> other;
  const Real* from = reinterpret_cast<const Real*>(&state);
  Real* to = reinterpret_cast<Real*>(&other);
#pragma unroll
  for (int i = 0; i < kRowStateSize; ++i) to[i] = __shfl_down_sync(0xffffffffu, from[i], distance);
  return other;
}

// The merged state of a group's threads, valid in its first lane.
template <int kGroup, typename Real>
__device__ __forceinline__ RowState<Real> merge_over_group(RowState<Real> state) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) state.merge(shuffle_down(state, distance));
  if constexpr (kGroup > kWarp) {
    static_assert(kGroup == kThreads, "a group is a warp or a CTA");
    __shared__ RowState<Real> warp_states[kGroup / kWarp];
    if (threadIdx.x % kWarp == 0) warp_states[threadIdx.x / kWarp] = state;
    __syncthreads();
    if (threadIdx.x == 0)
      for (int other = 1; other < kGroup / kWarp; ++other) state.merge(warp_states[other]);
  }
  return state;
}

__device__ __forceinline__ void check_label(int64_t label, const DivergenceParams& params, int lane) {
  if (label == params.ignore_index || (label >= 0 && label < params.vocab_size)) return;
  if (lane == 0)
    printf("tdpo_ext: labels hold %lld; allowed are 0 to %lld and ignore_index\n", (long long)label,
           (long long)params.vocab_size - 1);
  __trap();
}

// ---- kernels ----

// States (slices, rows): group row * slices + slice processes entries [slice * length, (slice + 1) * length).
template <typename T, typename Real, bool kSoftcap, int kGroup>
__global__ void __launch_bounds__(kThreads, sizeof(Real) == 4 ? kResidentBlocks : 1)
    row_state_kernel(DivergenceParams params, Real* states, int64_t slices, int64_t length) {
  constexpr int kPack = Pack<T>::size;
  const Part<kGroup> part(params, slices, length);
  if (part.row >= params.rows) return;  // whole groups leave, so no barrier or shuffle waits for them
  const int64_t label = params.labels[part.row];
  auto* const out = reinterpret_cast<RowState<Real>*>(states) + part.index * params.rows + part.row;
  check_label(label, params, part.lane);
  if (label == params.ignore_index) {
    if (part.lane == 0) *out = RowState<Real>::empty();
    return;
  }
  const Cap<Real, kSoftcap> cap(params);
  const InvTemperature<Real> inv_temp(params.temperature);
  const T* const z = static_cast<const T*>(params.logits.data) + params.logits.offset(part.row) + part.begin;
  const T* const r = static_cast<const T*>(params.ref_logits.data) + params.ref_logits.offset(part.row) + part.begin;
  const bool r_aligned = reinterpret_cast<uintptr_t>(z) % 16 == reinterpret_cast<uintptr_t>(r) % 16;

  auto state = RowState<Real>::empty();
  const auto add_entry = [&](int v) { state.update(cap(to_real(z[v])), cap(to_real(r[v])), inv_temp); };
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
      z_top = fmax(z_top, max_of(z_pack[b]));
      r_top = fmax(r_top, max_of(r_pack[b]));
    }
    // One rarely-true test per batch. Softcapping is monotonic, so it may follow the maximum.
    state.raise_maxima(fmax(state.z_max, cap(z_top) * inv_temp.base2), fmax(state.r_max, cap(r_top) * inv_temp.base2));
    const Real z_shift = finite_max(state.z_max), r_shift = finite_max(state.r_max);
#pragma unroll
    for (int b = 0; b < batch(); ++b)
#pragma unroll
      for (int i = 0; i < kPack; ++i)
        state.sums.template add<DeviceMath<Real>>(cap(to_real(z_pack[b].entry[i])), cap(to_real(r_pack[b].entry[i])),
                                                  z_shift, r_shift, inv_temp);
  };
  for_entries<kGroup, kPack>(reinterpret_cast<uintptr_t>(z), sizeof(T), part.count, part.lane, add_entry, add_packs);

  state = merge_over_group<kGroup>(state);
  if (part.lane == 0) {
    const int64_t at = label - params.vocab_start - part.begin;
    if (at >= 0 && at < part.count) {
      state.z_label = cap(to_real(z[at]));
      state.r_label = cap(to_real(r[at]));
    }
    *out = state;
  }
}

// States (slices, rows) -> (rows): one thread per row, slices in order.
template <typename Real>
__global__ void merge_kernel(const RowState<Real>* states, int64_t slices, int64_t rows, RowState<Real>* merged) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  auto total = RowState<Real>::empty();
  for (int64_t slice = 0; slice < slices; ++slice) total.merge(states[slice * rows + row]);
  merged[row] = total;
}

// States (rows) -> values (kTokenValues, rows): one thread per row.
template <typename Real>
__global__ void finalize_kernel(const RowState<Real>* states, const int64_t* labels, int64_t rows, int64_t ignore_index,
                                double temperature, Real* values) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  TokenValues<Real> token_values{};
  if (labels[row] != ignore_index) token_values = states[row].finalize(InvTemperature<Real>(temperature));
  token_values.store(values, rows, row);
}

// Group row * tiles + tile writes entries [tile * length, (tile + 1) * length). The output may overwrite the logits:
// each entry is read and written by one thread only, in this order.
template <typename T, typename Real, typename Out, bool kSoftcap, int kGroup>
__global__ void __launch_bounds__(kThreads, sizeof(Real) == 4 ? kResidentBlocks : 1)
    gradient_kernel(DivergenceParams params, GradientParams grad, int64_t tiles, int64_t length) {
  constexpr int kPack = Pack<T>::size;
  using OutPack = Entries<Out, kPack>;
  const Part<kGroup> part(params, tiles, length);
  if (part.row >= params.rows) return;
  const T* const z = static_cast<const T*>(params.logits.data) + params.logits.offset(part.row) + part.begin;
  const T* const r = static_cast<const T*>(params.ref_logits.data) + params.ref_logits.offset(part.row) + part.begin;
  Out* const out = static_cast<Out*>(grad.out.data) + grad.out.offset(part.row) + part.begin;
  const auto address = reinterpret_cast<uintptr_t>(out);

  const Real logps_grad = static_cast<const Real*>(grad.logps_grad)[part.row];
  const Real kl_grad = static_cast<const Real*>(grad.kl_grad)[part.row];
  const int64_t label = params.labels[part.row];
  if (label == params.ignore_index || (logps_grad == Real(0) && kl_grad == Real(0))) {
    const Out zero = Rounded<Out>::of(Real(0));
    const auto clear = [&](int v, auto batch) {
#pragma unroll
      for (int i = 0; i < batch() * kPack; ++i) out[v + i / kPack * kGroup * kPack + i % kPack] = zero;
    };
    for_entries<kGroup, kPack>(address, sizeof(Out), part.count, part.lane, [&](int v) { out[v] = zero; }, clear);
    return;
  }
  const bool reads_reference = kl_grad != Real(0);
  const int64_t label_at = label - params.vocab_start - part.begin;
  const Cap<Real, kSoftcap> cap(params);
  const RowGradient<Real> coefficients(static_cast<const RowState<Real>*>(grad.states)[part.row], logps_grad, kl_grad,
                                       InvTemperature<Real>(params.temperature));
  const auto dz = [&](T z_raw, T r_raw, int v) {
    const Real z_entry = cap(to_real(z_raw));
    Real value = coefficients.template policy_part<DeviceMath<Real>>(z_entry);
    if (reads_reference) value -= coefficients.template reference_part<DeviceMath<Real>>(cap(to_real(r_raw)));
    if (v == label_at) value += coefficients.label_extra;  // before the only rounding
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

// data *= factor; returns before touching the data when factor is 1, which only the device knows.
template <typename T, typename Real>
__global__ void scale_kernel(T* data, int64_t count, const Real* factor) {
  const Real scale = *factor;
  if (scale == Real(1)) return;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step)
    data[i] = Rounded<T>::of(to_real(data[i]) * scale);
}

}  // namespace tdpo::cuda
