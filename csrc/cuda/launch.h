// The kernel launchers, called by the operators and by the emulator's tests: plain pointers and a stream.
#pragma once

#include "../params.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;  // as CUDA's headers have it, which the launchers' callers need not have

namespace tdpo::cuda {

// What states hold: float64 or float32, of the KL in which direction.
struct StateKind {
  bool is_double, reverse_kl;
};

// The number of slices per row with which `rows` rows fill `multiprocessors`.
int64_t row_slices(int64_t rows, int64_t vocab, int multiprocessors);

// The states of every slice, (slices, rows, kRowStateSize): float64 for float64 logits, float32 otherwise.
void launch_row_states(const DivergenceParams&, void* states, int64_t slices, cudaStream_t);
// States (slices, rows, kRowStateSize) -> merged (rows, kRowStateSize).
void launch_merge(const void* states, StateKind, int64_t slices, int64_t rows, void* merged, cudaStream_t);
// States (rows, kRowStateSize) -> values (kTokenValues, rows).
void launch_finalize(const void* states, StateKind, const int64_t* labels, int64_t rows, int64_t ignore_index,
                     double temperature, void* values, cudaStream_t);
void launch_gradient(const DivergenceParams&, const GradientParams&, cudaStream_t);
// data *= factor, a number in device memory: float64 for float64 data, float32 otherwise.
void launch_scale(void* data, DType, int64_t count, const void* factor, int multiprocessors, cudaStream_t);

}  // namespace tdpo::cuda
