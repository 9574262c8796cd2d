// What every backend's kernels are told: plain pointers, sizes and strides. No torch here.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TDPO_HOST_DEVICE __host__ __device__
#else
#define TDPO_HOST_DEVICE
#endif

namespace tdpo {

enum class DType { f32, f64, bf16, f16 };
constexpr int kDTypes = 4;

// Rows of a tensor whose leading dimensions collapse to at most two; strides in elements, the last dimension dense.
struct Rows {
  void* data;
  int64_t inner, outer_stride, inner_stride;

  TDPO_HOST_DEVICE int64_t offset(int64_t row) const {
    return inner_stride == outer_stride ? row * inner_stride : row / inner * outer_stride + row % inner * inner_stride;
  }
};

struct Problem {
  Rows logits, ref_logits;
  const int64_t* labels;
  int64_t rows, vocab;  // vocab: entries of this slice
  int64_t vocab_start;  // the slice's first entry, as labels count
  int64_t vocab_size;   // entries of the whole vocabulary, which labels must be below
  int64_t ignore_index;
  double temperature, softcap;  // softcap 0: none
  DType dtype;
};

struct Gradient {
  const void* states;  // (rows, kRowStateSize)
  const void* logp_grad;
  const void* kl_grad;
  Rows out;
  DType out_dtype;
  bool streaming_stores;  // the output will not be read soon and is larger than the cache
};

}  // namespace tdpo
