// The optional module _brgemm: out (+)= a @ b with a float32 result, by torch's batch-reduce GEMM kernels (brgemm).
// torch's CPU products round their result to the operands' dtype, which would drown the KL in rounding errors; here the
// float32 accumulators of bfloat16 products are stored unrounded. Float32 operands use brgemm too: where `b` is a
// transposed weight it is faster than torch's own product.
//
// The stable ABI has no brgemm, so this file alone includes ATen, and loads only in the torch release it was built
// with. tdpo_ext/ops/matmul.py checks the arguments, and multiplies without brgemm where this module or the processor
// lacks it.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <vector>

#include "packing.h"

namespace tdpo {
namespace {

// Rows of a tile of `out`, and columns and depth of a block of `b` that is packed: with its operands a tile fits the L2
// cache.
constexpr int64_t kTileRows = 128, kBlockColumns = 384, kBlockDepth = 512;
// Columns of a block of `b` where its depth is shared among threads (multiply_deep).
constexpr int64_t kDeepColumns = 512;
// Bytes that the sums of all threads may take there.
constexpr int64_t kDeepBytes = 16 << 20;
// Depth that is packed at once where `b` is packed whole (multiply_transposed).
constexpr int64_t kPackedDepth = 1024;
// Bytes of a block of `b` there, which is as wide as `b`.
constexpr int64_t kBlockBytes = 512 << 10;
// Rows of `a` at a time where the operands are exchanged.
constexpr int64_t kExchangedRows = 128;

// Whether torch has brgemm kernels for this dtype on this processor: where it has none, a call throws.
template <typename T>
bool has_brgemm() {
  static const bool works = [] {
    std::vector<T> a(32 * 32), b(32 * 32);
    std::vector<float> c(32 * 32);
    try {
      at::native::cpublas::brgemm(32, 32, 32, 32, 32, 32, false, a.data(), b.data(), c.data(), kPaired<T>);
      at::native::cpublas::brgemm_release(true);
      return true;
    } catch (const std::exception&) {
      return false;
    }
  }();
  return works;
}

// Packed operands, whose memory a thread uses again.
template <typename T>
struct Packed {
  std::vector<T> a, b;
};

// out (+)= a @ b, in parts that the functions below share among threads.
template <typename T>
struct Product {
  Matrix<T> a, b;
  float* out;
  int64_t out_stride;

  // Packs rows `k` and columns `n` of `b`.
  void pack(Range k, Range n, std::vector<T>& packed) const {
    packed.resize(padded_depth<T>(k.size) * n.size);
    pack_block(b, k, n, packed.data());
  }

  // out[m, n] (+)= a[m, k] @ b[k, n], whose block is packed; at most kTileRows rows at a time.
  void multiply(Range m, Range k, Range n, const T* packed_b, bool accumulate, std::vector<T>& packed_a) const {
    const int64_t depth = padded_depth<T>(k.size);
    for (int64_t row = m.begin; row < m.end(); row += kTileRows) {
      const Range tile = part_of(m, row, kTileRows);
      const T* rows = a.at(row, k.begin);
      int64_t row_stride = a.row_stride;
      if (a.column_stride != 1 || depth != k.size) {
        packed_a.resize(tile.size * depth);
        pack_rows(a, tile, k, packed_a.data());
        rows = packed_a.data();
        row_stride = depth;
      }
      at::native::cpublas::brgemm(tile.size, n.size, depth, row_stride, n.size, out_stride, accumulate, rows, packed_b,
                                  out + row * out_stride + n.begin, kPaired<T>);
    }
  }
};

// Calls f(task, packed) for every task, shared among threads.
template <typename T, typename F>
void run_tasks(int64_t tasks, F f) {
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    Packed<T> packed;
    for (int64_t task = first; task < last; ++task) f(task, packed);
    at::native::cpublas::brgemm_release(true);
  });
}

// Threads share the columns, and the rows too where there are few columns.
template <typename T>
void multiply_wide(const Product<T>& product, bool accumulate) {
  const Range rows{0, product.a.rows}, columns{0, product.b.columns}, depth{0, product.a.columns};
  const int64_t threads = at::get_num_threads();
  const int64_t block = std::min(kBlockColumns, (columns.size + threads - 1) / threads);
  const int64_t blocks = (columns.size + block - 1) / block;
  const int64_t bands = blocks >= threads ? 1 : std::min((threads + blocks - 1) / blocks, (rows.size + 63) / 64);
  const int64_t band = (rows.size + bands - 1) / bands;
  run_tasks<T>(blocks * bands, [&](int64_t task, Packed<T>& packed) {
    const Range m = part_of(rows, task / blocks * band, band), n = part_of(columns, task % blocks * block, block);
    for (int64_t k = 0; k < depth.size; k += kBlockDepth) {
      const Range some = part_of(depth, k, kBlockDepth);
      product.pack(some, n, packed.b);
      product.multiply(m, some, n, packed.b.data(), accumulate || k > 0, packed.a);
    }
  });
}

// dhidden = dz @ weight: threads share the depth, which is the vocabulary, and have a sum each.
template <typename T>
void multiply_deep(const Product<T>& product, bool accumulate, int64_t threads) {
  const int64_t rows = product.a.rows, width = product.b.columns,
                blocks = (product.a.columns + kBlockDepth - 1) / kBlockDepth;
  const Range columns{0, width}, depth{0, product.a.columns};
  std::vector<float> sums((threads - 1) * rows * width);
  run_tasks<T>(threads, [&](int64_t thread, Packed<T>& packed) {
    Product<T> part = product;
    if (thread > 0) part.out = sums.data() + (thread - 1) * rows * width, part.out_stride = width;
    const int64_t first = blocks * thread / threads, last = blocks * (thread + 1) / threads;
    for (int64_t block = first; block < last; ++block) {
      const Range k = part_of(depth, block * kBlockDepth, kBlockDepth);
      for (int64_t n = 0; n < width; n += kDeepColumns) {
        const Range some = part_of(columns, n, kDeepColumns);
        part.pack(k, some, packed.b);
        part.multiply({0, rows}, k, some, packed.b.data(), block > first || (thread == 0 && accumulate), packed.a);
      }
    }
  });
  for (int64_t thread = 1; thread < threads; ++thread)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < width; ++column)
        product.out[row * product.out_stride + column] += sums[((thread - 1) * rows + row) * width + column];
}

// dW = dz^T @ hidden, where `a` must be packed: each of its tiles once, beside a `b` that is packed whole. Threads
// share the rows of the result, each of which is read and written once.
template <typename T>
void multiply_transposed(const Product<T>& product, bool accumulate) {
  const Range rows{0, product.a.rows}, columns{0, product.b.columns}, depth{0, product.a.columns};
  const int64_t tiles = (rows.size + kTileRows - 1) / kTileRows;
  const int64_t fitting = kBlockBytes / (columns.size * static_cast<int64_t>(sizeof(T)));
  const int64_t block_depth = std::clamp<int64_t>(fitting / 2 * 2, 64, kBlockDepth);
  for (int64_t begin = 0; begin < depth.size; begin += kPackedDepth) {
    const Range packed_depth = part_of(depth, begin, kPackedDepth);
    std::vector<std::vector<T>> packed_b;
    for (int64_t k = begin; k < packed_depth.end(); k += block_depth)
      product.pack(part_of(packed_depth, k, block_depth), columns, packed_b.emplace_back());
    run_tasks<T>(tiles, [&](int64_t tile, Packed<T>& packed) {
      for (size_t block = 0; block < packed_b.size(); ++block)
        product.multiply(part_of(rows, tile * kTileRows, kTileRows),
                         part_of(packed_depth, begin + block * block_depth, block_depth), columns,
                         packed_b[block].data(), accumulate || begin > 0 || block > 0, packed.a);
    });
  }
}

// out = a @ b as the transpose of b^T @ a^T, where `b` is a transposed weight and `a` has few rows: the weight is read
// as it lies, and `a` packed in its place. What costs is the transpose of the result, tile by tile, in the cache.
void multiply_exchanged(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  const Matrix<float> weight(b.t()), rows(a.t());  // (columns, depth) and (depth, rows)
  const Range columns{0, weight.rows}, depth{0, weight.columns}, count{0, rows.columns};
  std::vector<float> packed(depth.size * count.size);
  for (int64_t m = 0; m < count.size; m += kExchangedRows)
    for (int64_t k = 0; k < depth.size; k += kBlockDepth) {
      const Range band = part_of(count, m, kExchangedRows);
      pack_block(rows, part_of(depth, k, kBlockDepth), band, packed.data() + m * depth.size + k * band.size);
    }
  float* const result = out.data_ptr<float>();
  const int64_t out_stride = out.stride(0);
  at::parallel_for(0, (columns.size + kTileRows - 1) / kTileRows, 1, [&](int64_t first, int64_t last) {
    std::vector<float> tile(kTileRows * kExchangedRows);
    for (int64_t n = first * kTileRows; n < std::min(last * kTileRows, columns.size); n += kTileRows) {
      const int64_t width = part_of(columns, n, kTileRows).size;
      for (int64_t m = 0; m < count.size; m += kExchangedRows) {
        const int64_t height = part_of(count, m, kExchangedRows).size;
        for (int64_t k = 0; k < depth.size; k += kBlockDepth)
          at::native::cpublas::brgemm(width, height, part_of(depth, k, kBlockDepth).size, weight.row_stride, height,
                                      height, k > 0, weight.at(n, k), packed.data() + m * depth.size + k * height,
                                      tile.data(), false);
        transpose_words(tile.data(), height * sizeof(float), height, width, result + m * out_stride + n, out_stride);
      }
    }
    at::native::cpublas::brgemm_release(true);
  });
}

// Logits of few rows: `b` is a transposed weight, and the result takes so much less memory than it that to transpose
// the result costs less than to pack the weight. Of float32 alone: bfloat16 packs half as much, and gains nothing.
bool is_better_exchanged(const at::Tensor& a, const at::Tensor& b) {
  return 4 * a.size(0) <= a.size(1) && a.stride(1) == 1 && b.stride(0) == 1 && b.stride(1) >= b.size(0);
}

template <typename T>
void multiply(const at::Tensor& a, const at::Tensor& b, bool accumulate, const at::Tensor& out) {
  const Product<T> product{Matrix<T>(a), Matrix<T>(b), out.data_ptr<float>(), out.stride(0)};
  const int64_t threads = at::get_num_threads(), depth = a.size(1), columns = b.size(1);
  const int64_t sum_bytes = a.size(0) * columns * static_cast<int64_t>(sizeof(float));
  const bool is_deep = depth > columns && depth >= threads * kBlockDepth;
  if (a.stride(1) != 1)
    multiply_transposed(product, accumulate);
  else if (is_deep && (threads - 1) * sum_bytes <= kDeepBytes)
    multiply_deep(product, accumulate, threads);
  else
    multiply_wide(product, accumulate);
}

void brgemm(const at::Tensor& a, const at::Tensor& b, bool accumulate, const at::Tensor& out) {
  if (a.scalar_type() != at::kFloat)
    multiply<BFloat16>(a, b, accumulate, out);
  else if (!accumulate && is_better_exchanged(a, b))
    multiply_exchanged(a, b, out);
  else
    multiply<float>(a, b, accumulate, out);
}

bool has_brgemm_for(at::ScalarType dtype) {
  return dtype == at::kFloat ? has_brgemm<float>() : dtype == at::kBFloat16 && has_brgemm<BFloat16>();
}

}  // namespace

TORCH_LIBRARY_IMPL(tdpo_ext, CPU, m) { m.impl("brgemm", &brgemm); }
TORCH_LIBRARY_IMPL(tdpo_ext, CompositeExplicitAutograd, m) { m.impl("has_brgemm", &has_brgemm_for); }

}  // namespace tdpo
