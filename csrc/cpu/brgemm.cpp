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

// Where a product is written or added to: the place of its first row and column.
struct Sum {
  float* data;
  int64_t stride;
  bool is_added_to;

  Sum at(int64_t row, int64_t column, bool is_continued) const {
    return {data + row * stride + column, stride, is_added_to || is_continued};
  }
};

// Scratch memory of a thread, which it uses again.
template <typename T>
struct Scratch {
  std::vector<T> a, b;
  std::vector<float> sums;
};

template <typename T>
struct Operands {
  Matrix<T> a, b;

  Range rows() const { return {0, a.rows}; }
  Range columns() const { return {0, b.columns}; }
  Range depth() const { return {0, a.columns}; }

  // Packs rows `k` and columns `n` of `b`.
  void pack(Range k, Range n, std::vector<T>& packed) const {
    packed.resize(padded_depth<T>(k.size) * n.size);
    pack_block(b, k, n, packed.data());
  }

  // out (+)= a[m, k] @ the `columns` of b[k] that are packed; at most kTileRows rows at a time.
  void multiply(Range m, Range k, int64_t columns, const T* packed_b, Sum out, std::vector<T>& packed_a) const {
    const int64_t padded = padded_depth<T>(k.size);
    for (int64_t row = m.begin; row < m.end(); row += kTileRows) {
      const Range tile = part_of(m, row, kTileRows);
      const T* rows = a.at(row, k.begin);
      int64_t row_stride = a.row_stride;
      if (a.column_stride != 1 || padded != k.size) {
        packed_a.resize(tile.size * padded);
        pack_rows(a, tile, k, packed_a.data());
        rows = packed_a.data();
        row_stride = padded;
      }
      at::native::cpublas::brgemm(tile.size, columns, padded, row_stride, columns, out.stride, out.is_added_to, rows,
                                  packed_b, out.data + (row - m.begin) * out.stride, kPaired<T>);
    }
  }
};

// Calls f(task, scratch) for every task, shared among threads.
template <typename T, typename F>
void run_tasks(int64_t tasks, F f) {
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    Scratch<T> scratch;
    for (int64_t task = first; task < last; ++task) f(task, scratch);
    at::native::cpublas::brgemm_release(true);
  });
}

// Threads share the columns, and the rows too where there are few columns.
template <typename T>
void multiply_wide(const Operands<T>& operands, Sum out) {
  const Range rows = operands.rows(), columns = operands.columns(), depth = operands.depth();
  const int64_t threads = at::get_num_threads();
  const int64_t block = std::min(kBlockColumns, ceil_div(columns.size, threads));
  const int64_t blocks = ceil_div(columns.size, block);
  const int64_t bands = blocks >= threads ? 1 : std::min(ceil_div(threads, blocks), ceil_div(rows.size, 64));
  const int64_t band = ceil_div(rows.size, bands);
  run_tasks<T>(blocks * bands, [&](int64_t task, Scratch<T>& scratch) {
    const Range m = part_of(rows, task / blocks * band, band), n = part_of(columns, task % blocks * block, block);
    for (int64_t k = 0; k < depth.size; k += kBlockDepth) {
      const Range some = part_of(depth, k, kBlockDepth);
      operands.pack(some, n, scratch.b);
      operands.multiply(m, some, n.size, scratch.b.data(), out.at(m.begin, n.begin, k > 0), scratch.a);
    }
  });
}

// dhidden = dz @ weight: threads share the depth, which is the vocabulary, and have a sum each.
template <typename T>
void multiply_deep(const Operands<T>& operands, Sum out, int64_t threads) {
  const Range rows = operands.rows(), columns = operands.columns(), depth = operands.depth();
  const int64_t blocks = ceil_div(depth.size, kBlockDepth), entries = rows.size * columns.size;
  std::vector<float> sums((threads - 1) * entries);
  run_tasks<T>(threads, [&](int64_t thread, Scratch<T>& scratch) {
    const Sum sum = thread == 0 ? out : Sum{sums.data() + (thread - 1) * entries, columns.size, false};
    const int64_t first = blocks * thread / threads, last = blocks * (thread + 1) / threads;
    for (int64_t block = first; block < last; ++block) {
      const Range k = part_of(depth, block * kBlockDepth, kBlockDepth);
      for (int64_t n = 0; n < columns.size; n += kDeepColumns) {
        const Range some = part_of(columns, n, kDeepColumns);
        operands.pack(k, some, scratch.b);
        operands.multiply(rows, k, some.size, scratch.b.data(), sum.at(0, n, block > first), scratch.a);
      }
    }
  });
  for (int64_t thread = 1; thread < threads; ++thread)
    for (int64_t row = 0; row < rows.size; ++row)
      for (int64_t column = 0; column < columns.size; ++column)
        out.data[row * out.stride + column] += sums[(thread - 1) * entries + row * columns.size + column];
}

// `b` whole, in blocks of rows that are as wide as it.
template <typename T>
struct PackedWhole {
  std::vector<Range> depths;
  std::vector<std::vector<T>> blocks;

  PackedWhole(const Operands<T>& operands, Range depth) {
    const int64_t fitting = kBlockBytes / (operands.b.columns * static_cast<int64_t>(sizeof(T)));
    const int64_t block = std::clamp<int64_t>(fitting / 2 * 2, 64, kBlockDepth);
    for (int64_t k = depth.begin; k < depth.end(); k += block) {
      depths.push_back(part_of(depth, k, block));
      operands.pack(depths.back(), operands.columns(), blocks.emplace_back());
    }
  }

  // out (+)= a[m] @ b.
  void multiply(const Operands<T>& operands, Range m, Sum out, std::vector<T>& packed_a) const {
    for (size_t i = 0; i < blocks.size(); ++i)
      operands.multiply(m, depths[i], operands.b.columns, blocks[i].data(), out.at(0, 0, i > 0), packed_a);
  }
};

// dW = dz^T @ hidden, where `a` must be packed: each of its tiles once, beside a `b` that is packed whole, kPackedDepth
// at a time. Threads share the rows of the result; a tile of them is added to while it is in the cache.
template <typename T>
void multiply_transposed(const Operands<T>& operands, Sum out) {
  const Range rows = operands.rows(), depth = operands.depth();
  for (int64_t k = 0; k < depth.size; k += kPackedDepth) {
    const PackedWhole<T> packed(operands, part_of(depth, k, kPackedDepth));
    run_tasks<T>(ceil_div(rows.size, kTileRows), [&](int64_t tile, Scratch<T>& scratch) {
      const Range m = part_of(rows, tile * kTileRows, kTileRows);
      packed.multiply(operands, m, out.at(m.begin, 0, k > 0), scratch.a);
    });
  }
}

// The same, rounded to bfloat16 tile by tile.
void multiply_transposed_rounded(const Operands<BFloat16>& operands, BFloat16* out, int64_t out_stride) {
  const Range rows = operands.rows(), columns = operands.columns();
  const PackedWhole<BFloat16> packed(operands, operands.depth());
  run_tasks<BFloat16>(ceil_div(rows.size, kTileRows), [&](int64_t tile, Scratch<BFloat16>& scratch) {
    const Range m = part_of(rows, tile * kTileRows, kTileRows);
    scratch.sums.resize(kTileRows * columns.size);
    packed.multiply(operands, m, {scratch.sums.data(), columns.size, false}, scratch.a);
    for (int64_t row = 0; row < m.size; ++row)
      round_to_bfloat16(scratch.sums.data() + row * columns.size, columns.size, out + (m.begin + row) * out_stride);
  });
}

// out = a @ b as the transpose of b^T @ a^T, where `b` is a transposed weight and `a` has few rows: the weight is read
// as it lies, and `a` packed in its place. What costs is the transpose of the result, tile by tile, in the cache.
void multiply_exchanged(const at::Tensor& a, const at::Tensor& b, Sum out) {
  const Matrix<float> weight(b.t()), rows(a.t());  // (columns, depth) and (depth, rows)
  const Range columns{0, weight.rows}, depth{0, weight.columns}, count{0, rows.columns};
  std::vector<float> packed(depth.size * count.size);
  for (int64_t m = 0; m < count.size; m += kExchangedRows)
    for (int64_t k = 0; k < depth.size; k += kBlockDepth) {
      const Range band = part_of(count, m, kExchangedRows);
      pack_block(rows, part_of(depth, k, kBlockDepth), band, packed.data() + m * depth.size + k * band.size);
    }
  at::parallel_for(0, ceil_div(columns.size, kTileRows), 1, [&](int64_t first, int64_t last) {
    std::vector<float> tile(kTileRows * kExchangedRows);
    for (int64_t n = first * kTileRows; n < std::min(last * kTileRows, columns.size); n += kTileRows) {
      const int64_t width = part_of(columns, n, kTileRows).size;
      for (int64_t m = 0; m < count.size; m += kExchangedRows) {
        const int64_t height = part_of(count, m, kExchangedRows).size;
        for (int64_t k = 0; k < depth.size; k += kBlockDepth)
          at::native::cpublas::brgemm(width, height, part_of(depth, k, kBlockDepth).size, weight.row_stride, height,
                                      height, k > 0, weight.at(n, k), packed.data() + m * depth.size + k * height,
                                      tile.data(), false);
        transpose_words(tile.data(), height * sizeof(float), height, width, out.at(m, n, false).data, out.stride);
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
void multiply(const at::Tensor& a, const at::Tensor& b, Sum out) {
  const Operands<T> operands{Matrix<T>(a), Matrix<T>(b)};
  const int64_t threads = at::get_num_threads(), depth = a.size(1), columns = b.size(1);
  const int64_t sum_bytes = a.size(0) * columns * static_cast<int64_t>(sizeof(float));
  const bool is_deep = depth > columns && depth >= threads * kBlockDepth;
  if (a.stride(1) != 1 && a.size(0) >= columns)  // the result is as large as what is packed, at least
    multiply_transposed(operands, out);
  else if (is_deep && (threads - 1) * sum_bytes <= kDeepBytes)
    multiply_deep(operands, out, threads);
  else
    multiply_wide(operands, out);
}

// `out` is float32; or bfloat16, as the operands, where `a` is transposed and nothing is added to it.
void brgemm(const at::Tensor& a, const at::Tensor& b, bool accumulate, const at::Tensor& out) {
  if (out.scalar_type() == at::kBFloat16) {
    TORCH_CHECK(!accumulate && a.scalar_type() == at::kBFloat16, "a bfloat16 product is rounded once");
    const Operands<BFloat16> operands{Matrix<BFloat16>(a), Matrix<BFloat16>(b)};
    return multiply_transposed_rounded(operands, out.data_ptr<BFloat16>(), out.stride(0));
  }
  const Sum sum{out.data_ptr<float>(), out.stride(0), accumulate};
  if (a.scalar_type() != at::kFloat)
    multiply<BFloat16>(a, b, sum);
  else if (!accumulate && is_better_exchanged(a, b))
    multiply_exchanged(a, b, sum);
  else
    multiply<float>(a, b, sum);
}

bool has_brgemm_for(at::ScalarType dtype) {
  return dtype == at::kFloat ? has_brgemm<float>() : dtype == at::kBFloat16 && has_brgemm<BFloat16>();
}

}  // namespace

TORCH_LIBRARY_IMPL(tdpo_ext, CPU, m) { m.impl("brgemm", &brgemm); }
TORCH_LIBRARY_IMPL(tdpo_ext, CompositeExplicitAutograd, m) { m.impl("has_brgemm", &has_brgemm_for); }

}  // namespace tdpo
