// The launchers, as the operators and the emulator's tests call them: raw pointers and a stream.
#pragma once

#include "../problem.h"

#if defined(TDPO_EMULATOR)
using cudaStream_t = void*;
#else
#include <cuda_runtime_api.h>
#endif

namespace tdpo::cuda {

// Into how many slices a row's vocabulary is cut so that `rows` rows fill `multiprocessors`.
int64_t row_slices(int64_t rows, int64_t vocab, int multiprocessors);

// States of every slice, (slices, rows, state size); float64 for float64 logits, float32 otherwise.
void launch_row_states(const Problem&, void* states, int64_t slices, cudaStream_t);
void launch_merge(const void* states, bool is_double, int64_t slices, int64_t rows, void* merged, cudaStream_t);
// `outputs`: logps, ref_logps, kl, entropy, correct, each (rows).
void launch_finalize(const void* states, bool is_double, const int64_t* labels, int64_t rows, int64_t ignore_index,
                     double temperature, void* const outputs[5], cudaStream_t);
void launch_gradient(const Problem&, const Gradient&, cudaStream_t);
// data *= factor, one number on the device: float64 for float64 data, float32 otherwise.
void launch_scale(void* data, DType, int64_t count, const void* factor, int multiprocessors, cudaStream_t);

}  // namespace tdpo::cuda
