// The device kernels of the row states and of the gradient. Torch-free, and free of logits-sized temporaries: forward
// reads each logit once, backward reads it once and writes the gradient once, 16 bytes at a time where the rows' and
// the output's alignments allow.
//
// A row may be split over several CTAs: each leaves the state of its slice, and merge_kernel merges them in a fixed
// order. There are no atomics, so results are bitwise repeatable. Row offsets are 64-bit.
#pragma once

#include "device.h"

namespace tdpo::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

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

// Entries before the first 16-byte boundary of `data`; all of them where another pointer never meets it there.
template <typename T>
__device__ __forceinline__ int64_t entries_to_boundary(const T* data, const T* other, int64_t count) {
  const auto misaligned = reinterpret_cast<uintptr_t>(data) % 16;
  if (misaligned != reinterpret_cast<uintptr_t>(other) % 16) return count;
  const int64_t head = (16 - misaligned) % 16 / sizeof(T);
  return head < count ? head : count;
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

// The merged state of a CTA's threads, valid in thread 0.
template <typename Real>
__device__ __forceinline__ RowState<Real> merged_over_block(RowState<Real> state) {
  __shared__ RowState<Real> of_warp[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int distance = kWarp / 2; distance > 0; distance /= 2) state.merge(shuffled_down(state, distance));
  if (lane == 0) of_warp[warp] = state;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int other = 1; other < kWarps; ++other) state.merge(of_warp[other]);
  return state;
}

__device__ __forceinline__ void check_label(int64_t label, const Problem& problem) {
  if (label == problem.ignore_index || (label >= 0 && label < problem.vocab_size)) return;
  if (threadIdx.x == 0)
    printf("tdpo_ext: labels hold %lld; allowed are 0 to %lld and ignore_index\n", (long long)label,
           (long long)problem.vocab_size - 1);
  __trap();
}

// ---- kernels ----

// One CTA takes entries [slice * length, (slice + 1) * length) of one row; block index = row * slices + slice.
template <typename T, typename Real, bool kSoftcap>
__global__ void __launch_bounds__(kThreads)
    row_state_kernel(Problem problem, Real* states, int64_t slices, int64_t length) {
  const int64_t row = blockIdx.x / slices, slice = blockIdx.x % slices;
  const int64_t label = problem.labels[row];
  auto* const out = reinterpret_cast<RowState<Real>*>(states) + slice * problem.rows + row;
  check_label(label, problem);
  if (label == problem.ignore_index) {
    if (threadIdx.x == 0) *out = RowState<Real>::empty();
    return;
  }
  const Cap<Real, kSoftcap> cap(problem);
  const Temper<Real> temper(problem.temperature);
  const int64_t begin = slice * length, left = problem.vocab - begin, count = length < left ? length : left;
  const T* const z = static_cast<const T*>(problem.logits.data) + problem.logits.offset(row) + begin;
  const T* const r = static_cast<const T*>(problem.ref_logits.data) + problem.ref_logits.offset(row) + begin;

  auto state = RowState<Real>::empty();
  const auto one = [&](int64_t v) { state.update(cap(to_real(z[v])), cap(to_real(r[v])), temper); };
  const int64_t head = entries_to_boundary(z, r, count);
  const int64_t packs = (count - head) / Pack<T>::size, tail = head + packs * Pack<T>::size;
  for (int64_t v = threadIdx.x; v < head; v += kThreads) one(v);
  for (int64_t p = threadIdx.x; p < packs; p += kThreads) {
    const auto z_pack = reinterpret_cast<const Pack<T>*>(z + head)[p];
    const auto r_pack = reinterpret_cast<const Pack<T>*>(r + head)[p];
    Real z_entry[Pack<T>::size], r_entry[Pack<T>::size];
    Real z_top = state.z_max, r_top = state.r_max;
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i) {
      z_entry[i] = cap(to_real(z_pack.entry[i]));
      r_entry[i] = cap(to_real(r_pack.entry[i]));
      z_top = fmax(z_top, z_entry[i] * temper.binary);
      r_top = fmax(r_top, r_entry[i] * temper.binary);
    }
    state.raise_maxima(z_top, r_top);  // one test a pack; rarely true
    const Real z_shift = shift_of(state.z_max), r_shift = shift_of(state.r_max);
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i)
      state.sums.template add<DeviceMath<Real>>(z_entry[i], r_entry[i], z_shift, r_shift, temper);
  }
  for (int64_t v = tail + threadIdx.x; v < count; v += kThreads) one(v);

  state = merged_over_block(state);
  if (threadIdx.x == 0) {
    const int64_t at = label - problem.vocab_start - begin;
    if (at >= 0 && at < count) {
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
  Real *logps, *ref_logps, *kl, *entropy;
};

template <typename Real>
__global__ void finalize_kernel(const RowState<Real>* states, const int64_t* labels, int64_t rows, int64_t ignore_index,
                                double temperature, ValueOutputs<Real> out) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  TokenValues<Real> values{0, 0, 0, 0};
  if (labels[row] != ignore_index) values = states[row].finalize(Temper<Real>(temperature));
  out.logps[row] = values.logp;
  out.ref_logps[row] = values.ref_logp;
  out.kl[row] = values.kl;
  out.entropy[row] = values.entropy;
}

// One CTA writes entries [tile * length, (tile + 1) * length) of one row; block index = row * tiles + tile. `out` may
// be the logits themselves: a thread reads an entry before it writes it, and no other thread reads it.
template <typename T, typename Real, typename Out, bool kSoftcap>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(Problem problem, Gradient gradient, int64_t tiles, int64_t length) {
  constexpr int kPack = Pack<T>::size;
  const int64_t row = blockIdx.x / tiles, begin = blockIdx.x % tiles * length, left = problem.vocab - begin;
  const int64_t count = length < left ? length : left;
  const T* const z = static_cast<const T*>(problem.logits.data) + problem.logits.offset(row) + begin;
  const T* const r = static_cast<const T*>(problem.ref_logits.data) + problem.ref_logits.offset(row) + begin;
  Out* const out = static_cast<Out*>(gradient.out.data) + gradient.out.offset(row) + begin;

  const Real logp_grad = static_cast<const Real*>(gradient.logp_grad)[row];
  const Real kl_grad = static_cast<const Real*>(gradient.kl_grad)[row];
  const int64_t label = problem.labels[row];
  const bool nothing = label == problem.ignore_index || (logp_grad == Real(0) && kl_grad == Real(0));
  const bool reads_reference = kl_grad != Real(0);
  const int64_t label_at = label - problem.vocab_start - begin;
  const Cap<Real, kSoftcap> cap(problem);
  const RowGradient<Real> coefficients(static_cast<const RowState<Real>*>(gradient.states)[row], logp_grad, kl_grad,
                                       Temper<Real>(problem.temperature));

  const auto dz = [&](T z_raw, T r_raw, int64_t v) {
    if (nothing) return Rounded<Out>::of(Real(0));
    const Real z_entry = cap(to_real(z_raw));
    Real value = coefficients.template policy_part<DeviceMath<Real>>(z_entry);
    if (reads_reference) value -= coefficients.template reference_part<DeviceMath<Real>>(cap(to_real(r_raw)));
    if (v == label_at) value += coefficients.label_extra;  // before the one rounding
    return Rounded<Out>::of(value * cap.slope(z_entry));
  };
  const auto one = [&](int64_t v) { out[v] = dz(z[v], reads_reference ? r[v] : z[v], v); };

  int64_t head = entries_to_boundary(z, reads_reference ? r : z, count);
  if (reinterpret_cast<uintptr_t>(out + head) % (kPack * sizeof(Out)) != 0) head = count;
  const int64_t packs = (count - head) / kPack, tail = head + packs * kPack;
  for (int64_t v = threadIdx.x; v < head; v += kThreads) one(v);
  for (int64_t p = threadIdx.x; p < packs; p += kThreads) {
    const auto z_pack = reinterpret_cast<const Pack<T>*>(z + head)[p];
    const auto r_pack = reads_reference ? reinterpret_cast<const Pack<T>*>(r + head)[p] : z_pack;
    Entries<Out, kPack> result;
#pragma unroll
    for (int i = 0; i < kPack; ++i) result.entry[i] = dz(z_pack.entry[i], r_pack.entry[i], head + p * kPack + i);
    reinterpret_cast<Entries<Out, kPack>*>(out + head)[p] = result;
  }
  for (int64_t v = tail + threadIdx.x; v < count; v += kThreads) one(v);
}

}  // namespace tdpo::cuda
