// Kernel parameters, the same for every backend: plain pointers, sizes and strides. No torch here.
#pragma once

#include "dtype.h"

namespace tdpo {

// Rows of a tensor whose leading dimensions collapse to at most two; strides in elements, the last dimension dense.
struct RowView {
  void* data;
  int64_t inner, outer_stride, inner_stride;

  TDPO_HOST_DEVICE int64_t offset(int64_t row) const {
    return inner_stride == outer_stride ? row * inner_stride : row / inner * outer_stride + row % inner * inner_stride;
  }
};

struct DivergenceParams {
  RowView logits, ref_logits;
  const int64_t* labels;
  int64_t rows, vocab;          // vocab: entries of this slice
  int64_t vocab_start;          // first entry of this slice, as an index into the whole vocabulary
  int64_t vocab_size;           // entries of the whole vocabulary: labels lie in [0, vocab_size)
  int64_t ignore_index;         // rows with this label give zeros
  double temperature, softcap;  // softcap 0: none
  bool reverse_kl;              // KL(policy || reference) instead of KL(reference || policy)
  DType dtype;                  // of both logits
};

// Calls f(softcap, reverse) with what changes the kernels' code as compile-time constants.
template <typename F>
void with_row_kind(const DivergenceParams& params, F f) {
  with_constant(params.softcap > 0,
                [&](auto softcap) { with_constant(params.reverse_kl, [&](auto reverse) { f(softcap, reverse); }); });
}

struct GradientParams {
  const void* states;      // (rows, kRowStateSize)
  const void* logps_grad;  // (rows), dL/dlogps
  const void* kl_grad;     // (rows), dL/dkl
  RowView out;             // dL/dlogits; may be the logits' own memory, on a CPU also of a narrower dtype
  DType out_dtype;
};

}  // namespace tdpo
