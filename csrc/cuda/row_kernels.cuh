// The device kernels of row states and gradients. Torch-free, and without logits-sized temporaries: forward reads each
// logit once; backward reads it once and writes the gradient once. Rows are processed in 16-byte packs, starting where
// z (forward) or the gradient (backward) is aligned; the head before and the tail after go entry by entry, and so do
// loads from a row that is aligned differently. Each thread loads kBatch packs of both rows per iteration before it
// uses the first of them. tools/machine_code.py counts what the loops compile to.
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
// CTAs per multiprocessor that the register budget must allow. With fewer registers, the softcapped gradient would load
// half of its batch only after it has used the other half.
constexpr int kResidentBlocks = 3, kResidentSoftcapGradients = 2;

// ---- device helpers ----

// The part of a row that a group of kGroup threads processes. A row has `parts` parts of `length` entries each; the
// groups of a CTA process the same part of consecutive rows, so that one 32-bit division is enough.
template <int kGroup>
struct Part {
  int64_t row, index, begin;
  int lane, count;

  __device__ Part(const DivergenceParams& params, unsigned parts, int64_t length) : lane(threadIdx.x % kGroup) {
    row = int64_t(blockIdx.x / parts) * (kThreads / kGroup) + threadIdx.x / kGroup;
    index = blockIdx.x % parts;
    begin = index * length;
    const int64_t left = params.vocab - begin;
    count = int(left < 0 ? 0 : (length < left ? length : left));
  }
};

// A part's entries, split into a head, packs and a tail, and shared among the lanes of a group. Packs start where
// `address`, of entries of `size` bytes, is a multiple of a pack's bytes.
template <int kGroup, int kPack>
struct Split {
  int head, packs, count;

  __device__ Split(uintptr_t address, int size, int count) : count(count) {
    const int bytes = kPack * size;
    head = int((bytes - address % bytes) % bytes) / size;
    if (address % size != 0 || head > count) head = count;
    packs = (count - head) / kPack;
  }

  // Calls f(entry) for entries of the head and the tail, and f_packs(first entry, batch), with a compile-time batch,
  // for packs.
  template <typename F, typename G>
  __device__ __forceinline__ void for_each(int lane, F f, G f_packs) const {
#pragma unroll 1
    for (int v = lane; v < head; v += kGroup) f(v);
    int p = lane;
#pragma unroll 1
    for (; p + (kBatch - 1) * kGroup < packs; p += kBatch * kGroup)
      f_packs(head + p * kPack, std::integral_constant<int, kBatch>{});
#pragma unroll 1
    for (; p < packs; p += kGroup) f_packs(head + p * kPack, std::integral_constant<int, 1>{});
#pragma unroll 1
    for (int v = head + packs * kPack + lane; v < count; v += kGroup) f(v);
  }

  // The lane to which for_each gives an entry.
  __device__ int lane_of(int entry) const {
    const int after_head = entry - head, tail = after_head - packs * kPack;
    return (after_head < 0 ? entry : tail < 0 ? after_head / kPack : tail) % kGroup;
  }
};

template <typename Real, bool kReverse>
__device__ __forceinline__ RowState<Real, kReverse> shuffle_down(const RowState<Real, kReverse>& state, int distance) {
  RowState<Real, kReverse> other;
  const Real* from = reinterpret_cast<const Real*>(&state);
  Real* to = reinterpret_cast<Real*>(&other);
#pragma unroll
  for (int i = 0; i < kRowStateSize; ++i) to[i] = __shfl_down_sync(0xffffffffu, from[i], distance);
  return other;
}

// The merged state of a group's threads, valid in its first lane.
template <int kGroup, typename State>
__device__ __forceinline__ State merge_over_group(State state) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) state.merge(shuffle_down(state, distance));
  if constexpr (kGroup > kWarp) {
    static_assert(kGroup == kThreads, "a group is a warp or a CTA");
    __shared__ State warp_states[kGroup / kWarp];
    if (threadIdx.x % kWarp == 0) warp_states[threadIdx.x / kWarp] = state;
    __syncthreads();
    if (threadIdx.x == 0)
      for (int other = 1; other < kGroup / kWarp; ++other) state.merge(warp_states[other]);
  }
  return state;
}

// Whether a label is allowed. Where it is not, one lane of its first part says so and stops the kernel. The others
// leave: a trap of theirs could come before the message has left the device.
template <int kGroup>
__device__ __forceinline__ bool check_label(int64_t label, const DivergenceParams& params, const Part<kGroup>& part) {
  if (label == params.ignore_index || (label >= 0 && label < params.vocab_size)) return true;
  if (part.lane == 0 && part.index == 0) {
    printf("tdpo_ext: labels hold %lld; allowed are 0 to %lld and ignore_index\n", (long long)label,
           (long long)params.vocab_size - 1);
    __trap();
  }
  return false;
}

// ---- kernels ----

// States (slices, rows): group row * slices + slice processes entries [slice * length, (slice + 1) * length).
template <typename T, typename Real, bool kSoftcap, bool kReverse, int kGroup>
__global__ void __launch_bounds__(kThreads, sizeof(Real) == 4 ? kResidentBlocks : 1)
    row_state_kernel(DivergenceParams params, Cap<Real, kSoftcap> cap, InvTemperature<Real> inv_temp, Real* states,
                     unsigned slices, int64_t length) {
  using State = RowState<Real, kReverse>;
  constexpr int kPack = Pack<T>::size;
  const Part<kGroup> part(params, slices, length);
  if (part.row >= params.rows) return;  // whole groups leave, so no barrier or shuffle waits for them
  const int64_t label = params.labels[part.row];
  auto* const out = reinterpret_cast<State*>(states) + part.index * params.rows + part.row;
  if (!check_label(label, params, part)) return;
  if (label == params.ignore_index) {
    if (part.lane == 0) *out = State::empty();
    return;
  }
  const T* const z = static_cast<const T*>(params.logits.data) + params.logits.offset(part.row) + part.begin;
  const T* const r = static_cast<const T*>(params.ref_logits.data) + params.ref_logits.offset(part.row) + part.begin;

  auto state = State::empty();
  const auto add_entry = [&](int v) { state.update(cap(to_real(z[v])), cap(to_real(r[v])), inv_temp); };
  const auto add_batch = [&](auto r_aligned, int v, auto batch) {
    Pack<T> z_pack[batch()], r_pack[batch()];
#pragma unroll
    for (int b = 0; b < batch(); ++b) {
      z_pack[b] = load_pack<true>(z + v + b * kGroup * kPack);
      r_pack[b] = load_pack<r_aligned()>(r + v + b * kGroup * kPack);
    }
    Real z_top = max_of(z_pack[0]), r_top = max_of(r_pack[0]);
#pragma unroll
    for (int b = 1; b < batch(); ++b) {
      z_top = fmax(z_top, max_of(z_pack[b]));
      r_top = fmax(r_top, max_of(r_pack[b]));
    }
    // One rarely-true test per batch. Softcapping is monotonic, so it may follow the maximum. A running maximum is
    // never below running_max's floor, so only a new one has to be brought up to it.
    const Real new_z_max = fmax(state.z_max, cap(z_top) * inv_temp.base2);
    const Real new_r_max = fmax(state.r_max, cap(r_top) * inv_temp.base2);
    if (new_z_max != state.z_max || new_r_max != state.r_max)
      state.raise_maxima(running_max(state.z_max, new_z_max), running_max(state.r_max, new_r_max));
    const Shifts<Real> shifts(state.z_max, state.r_max, inv_temp);
    RowSums<Real, kReverse> sums{};
#pragma unroll
    for (int b = 0; b < batch(); ++b) {
      Real z_entries[kPack], r_entries[kPack];
      unpack(z_pack[b], z_entries);
      unpack(r_pack[b], r_entries);
#pragma unroll
      for (int i = 0; i < kPack; ++i)
        sums.template add<FiniteMath<Real>, false>(cap(z_entries[i]), cap(r_entries[i]), shifts, inv_temp);
    }
    // An infinite logit makes the gap or z_dot infinite or NaN. Then, and where the maxima are far apart, the batch is
    // read again, with every entry tested.
    if (shifts.far_apart() || !(fabs(sums.gap + sums.bregman + sums.z_dot) < std::numeric_limits<Real>::infinity())) {
      sums = {};
#pragma unroll 1
      for (int i = 0; i < batch() * kPack; ++i) {
        const int at = v + i / kPack * kGroup * kPack + i % kPack;
        sums.template add<DeviceMath<Real>, true>(cap(to_real(z[at])), cap(to_real(r[at])), shifts, inv_temp);
      }
    }
    state.sums += sums;
  };
  // z is aligned wherever packs start.
  const Split<kGroup, kPack> split(reinterpret_cast<uintptr_t>(z), sizeof(T), part.count);
  with_constant(is_aligned(r + split.head, 16), [&](auto r_aligned) {
    split.for_each(part.lane, add_entry, [&](int v, auto batch) { add_batch(r_aligned, v, batch); });
  });

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
template <typename State>
__global__ void merge_kernel(const State* states, int64_t slices, int64_t rows, State* merged) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  auto total = State::empty();
  for (int64_t slice = 0; slice < slices; ++slice) total.merge(states[slice * rows + row]);
  merged[row] = total;
}

// States (rows) -> values (kTokenValues, rows): one thread per row.
template <typename State, typename Real>
__global__ void finalize_kernel(const State* states, const int64_t* labels, int64_t rows, int64_t ignore_index,
                                double temperature, Real* values) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  TokenValues<Real> token_values{};
  if (labels[row] != ignore_index) {
    if (states[row].is_out_of_range()) {
      printf("tdpo_ext: logits or ref_logits have a maximum that is too large at row %lld\n", (long long)row);
      __trap();
    }
    token_values = states[row].finalize(InvTemperature<Real>(temperature));
  }
  token_values.store(values, rows, row);
}

// Group row * tiles + tile writes entries [tile * length, (tile + 1) * length). The output may overwrite the logits:
// each entry is read and written by one thread only, in this order.
template <typename T, typename Real, typename Out, bool kSoftcap, bool kReverse, int kGroup>
__global__ void __launch_bounds__(kThreads, sizeof(Real) == 8 ? 1
                                            : kSoftcap        ? kResidentSoftcapGradients
                                                              : kResidentBlocks)
    gradient_kernel(DivergenceParams params, GradientParams grad, Cap<Real, kSoftcap> cap,
                    InvTemperature<Real> inv_temp, unsigned tiles, int64_t length) {
  constexpr int kPack = Pack<T>::size;
  using OutPack = Entries<Out, kPack>;
  const Part<kGroup> part(params, tiles, length);
  if (part.row >= params.rows) return;
  const T* const z = static_cast<const T*>(params.logits.data) + params.logits.offset(part.row) + part.begin;
  const T* const r = static_cast<const T*>(params.ref_logits.data) + params.ref_logits.offset(part.row) + part.begin;
  Out* const out = static_cast<Out*>(grad.out.data) + grad.out.offset(part.row) + part.begin;
  const Split<kGroup, kPack> split(reinterpret_cast<uintptr_t>(out), sizeof(Out), part.count);

  const Real logps_grad = static_cast<const Real*>(grad.logps_grad)[part.row];
  const Real kl_grad = static_cast<const Real*>(grad.kl_grad)[part.row];
  const int64_t label = params.labels[part.row];
  if (label == params.ignore_index || (logps_grad == Real(0) && kl_grad == Real(0))) {
    const Out zero = Rounded<Out>::of(Real(0));
    OutPack zeros;
#pragma unroll
    for (int i = 0; i < kPack; ++i) zeros.entry[i] = zero;
    const auto clear = [&](int v, auto batch) {
#pragma unroll
      for (int b = 0; b < batch(); ++b) *reinterpret_cast<OutPack*>(out + v + b * kGroup * kPack) = zeros;
    };
    split.for_each(part.lane, [&](int v) { out[v] = zero; }, clear);
    return;
  }
  const RowGradient<Real, kReverse> gradient(static_cast<const RowState<Real, kReverse>*>(grad.states)[part.row],
                                             logps_grad, kl_grad, inv_temp);
  // The loops exist with and without the reference and wide loads, so that all loads of a batch are issued before the
  // first of them is waited for. Loads of a reference that is not needed disappear.
  const auto write = [&](auto reads_reference, auto aligned) {
    const auto dz = [&](Real z_raw, Real r_raw, auto is_label) {
      const Real z_entry = cap(z_raw);
      const Real r_entry = reads_reference() ? cap(r_raw) : r_raw;
      Real value = gradient.template at<DeviceMath<Real>, reads_reference()>(z_entry, r_entry);
      if constexpr (is_label()) value += gradient.label_extra;  // before the only rounding
      return Rounded<Out>::of(value * cap.slope(z_entry));
    };
    const auto write_packs = [&](int v, auto batch) {
      Pack<T> z_pack[batch()], r_pack[batch()];
#pragma unroll
      for (int b = 0; b < batch(); ++b) {
        z_pack[b] = load_pack<aligned()>(z + v + b * kGroup * kPack);
        r_pack[b] = load_pack<aligned()>((reads_reference() ? r : z) + v + b * kGroup * kPack);
      }
#pragma unroll
      for (int b = 0; b < batch(); ++b) {
        Real z_entries[kPack], r_entries[kPack];
        unpack(z_pack[b], z_entries);
        unpack(r_pack[b], r_entries);
        OutPack result;
#pragma unroll
        for (int i = 0; i < kPack; ++i) result.entry[i] = dz(z_entries[i], r_entries[i], std::false_type{});
        *reinterpret_cast<OutPack*>(out + v + b * kGroup * kPack) = result;
      }
    };
    const auto dz_at = [&](int64_t v, auto is_label) {
      return dz(to_real(z[v]), to_real(reads_reference() ? r[v] : z[v]), is_label);
    };
    // The label's entry alone has one more term. The lane that writes this entry with the others forms it before, from
    // logits that the gradient may overwrite, and writes it again afterwards.
    const int64_t label_at = label - params.vocab_start - part.begin;
    const bool has_label = label_at >= 0 && label_at < part.count && split.lane_of(int(label_at)) == part.lane;
    Out at_label{};
    if (has_label) at_label = dz_at(label_at, std::true_type{});
    split.for_each(part.lane, [&](int v) { out[v] = dz_at(v, std::false_type{}); }, write_packs);
    if (has_label) out[label_at] = at_label;
  };
  const bool reads_reference = kl_grad != Real(0);
  const bool aligned = is_aligned(z + split.head, 16) && (!reads_reference || is_aligned(r + split.head, 16));
  with_constant(reads_reference,
                [&](auto with_reference) { with_constant(aligned, [&](auto wide) { write(with_reference, wide); }); });
}

// data *= factor; returns before touching the data when factor is 1, which only the device knows.
template <typename T, typename Real>
__global__ void scale_kernel(T* data, int64_t count, const Real* factor) {
  constexpr int kPack = Pack<T>::size;
  const Real scale = *factor;
  if (scale == Real(1)) return;
  const auto scaled = [&](T x) { return Rounded<T>::of(to_real(x) * scale); };
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
  int64_t head = int64_t((16 - reinterpret_cast<uintptr_t>(data) % 16) % 16 / sizeof(T));
  if (head > count) head = count;
  const int64_t packs = (count - head) / kPack;
  auto* const pack_data = reinterpret_cast<Pack<T>*>(data + head);
#pragma unroll 1
  for (int64_t p = thread; p < packs; p += threads) {
    Pack<T> pack = pack_data[p];
#pragma unroll
    for (int i = 0; i < kPack; ++i) pack.entry[i] = scaled(pack.entry[i]);
    pack_data[p] = pack;
  }
  // The entries before and after the packs, fewer than two packs' worth.
#pragma unroll 1
  for (int64_t i = thread; i < count - packs * kPack; i += threads) {
    T& entry = data[i < head ? i : i + packs * kPack];
    entry = scaled(entry);
  }
}

}  // namespace tdpo::cuda
