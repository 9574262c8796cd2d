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

#include <cstring>
#include <type_traits>
#include <vector>

namespace tdpo {
namespace {

using at::BFloat16;
constexpr int64_t kTileRows = 128, kBlockColumns = 384, kBlockDepth = 512;
// Blocks where `a` must be packed too: wider, so that it is packed less often.
constexpr int64_t kWideColumns = 768, kWideDepth = 256;
// Rows of `a` at a time where the operands are exchanged.
constexpr int64_t kExchangedRows = 128;

template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, columns, row_stride, column_stride;

  explicit Matrix(const at::Tensor& t)
      : data(t.const_data_ptr<T>()),
        rows(t.size(0)),
        columns(t.size(1)),
        row_stride(t.stride(0)),
        column_stride(t.stride(1)) {}
  const T* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
};

// A range of rows, columns or depth (the dimension that a product sums over).
struct Range {
  int64_t begin, size;
};

// The bfloat16 kernels read `b` in pairs of rows ("VNNI" layout), so their depth is padded to an even number.
template <typename T>
constexpr bool kPaired = sizeof(T) == 2;

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

// out[i][j] = in[j][i] for a square as wide as one register: after log2(lanes) rounds of interleaving row r with row
// r + lanes / 2, rows have become columns.
template <typename T, int kBytes = 16>
struct Square {
  static constexpr int lanes = kBytes / sizeof(T);
  typedef T Register __attribute__((vector_size(kBytes)));
  typedef std::conditional_t<sizeof(T) == 2, int16_t, int32_t> Index;
  typedef Index Indices __attribute__((vector_size(kBytes)));

  // mixed = {a[first], b[first], a[first + 1], b[first + 1], ...}. Inlined, so that it is compiled for the caller's
  // instruction set.
  __attribute__((always_inline)) static void interleave(const Register& a, const Register& b, int first,
                                                        Register& mixed) {
#if defined(__clang__)
    // clang has no __builtin_shuffle, and makes one of this.
    for (int i = 0; i < lanes; ++i) mixed[i] = (i % 2 == 0 ? a : b)[first + i / 2];
#else
    Indices order;
    for (int i = 0; i < lanes; ++i) order[i] = first + i / 2 + i % 2 * lanes;
    mixed = __builtin_shuffle(a, b, order);
#endif
  }

  // `in_stride` in bytes, `out_stride` in entries. Inlined for the same reason.
  __attribute__((always_inline)) static void transpose(const void* in, int64_t in_stride, void* out,
                                                       int64_t out_stride) {
    Register rows[lanes], mixed[lanes];
    for (int r = 0; r < lanes; ++r) std::memcpy(&rows[r], static_cast<const char*>(in) + r * in_stride, kBytes);
    for (int round = lanes; round > 1; round /= 2) {
      for (int r = 0; r < lanes / 2; ++r) {
        interleave(rows[r], rows[r + lanes / 2], 0, mixed[2 * r]);
        interleave(rows[r], rows[r + lanes / 2], lanes / 2, mixed[2 * r + 1]);
      }
      for (int r = 0; r < lanes; ++r) rows[r] = mixed[r];
    }
    for (int r = 0; r < lanes; ++r) std::memcpy(static_cast<T*>(out) + r * out_stride, &rows[r], kBytes);
  }
};

// Packs rows `k` and columns `n` of `b` for brgemm: dense for float, pairs of rows interleaved for bfloat16. Zeros fill
// the rows up to `padded_depth`.
void pack_block(const Matrix<float>& b, Range k, int64_t, Range n, float* packed) {
  for (int64_t i = 0; i < k.size; ++i)
    for (int64_t j = 0; j < n.size; ++j) packed[i * n.size + j] = *b.at(k.begin + i, n.begin + j);
}
void pack_block(const Matrix<BFloat16>& b, Range k, int64_t padded_depth, Range n, BFloat16* packed) {
  for (int64_t i = 0; i < padded_depth; i += 2) {
    BFloat16* row = packed + i * n.size;
    const BFloat16 *first = b.at(k.begin + i, n.begin), *second = b.at(k.begin + i + 1, n.begin);
    const bool both = i + 1 < k.size;
    const int64_t step = b.column_stride;
    if (step == 1 && both) {
      for (int64_t j = 0; j < n.size; ++j) row[2 * j] = first[j], row[2 * j + 1] = second[j];
    } else {
      for (int64_t j = 0; j < n.size; ++j) {
        row[2 * j] = first[j * step];
        row[2 * j + 1] = both ? second[j * step] : BFloat16(0);
      }
    }
  }
}

// Transposes a matrix of 32-bit words in squares of kBytes wide, out[i][j] = source[j][i]; whatever is left over, word
// by word. `stride` in bytes, `out_stride` in words.
template <int kBytes>
__attribute__((always_inline)) inline void transpose_words(const char* source, int64_t stride, int64_t words,
                                                           int64_t columns, uint32_t* out, int64_t out_stride) {
  using Words = Square<uint32_t, kBytes>;
  const auto copy_word = [&](int64_t i, int64_t j) {
    std::memcpy(out + i * out_stride + j, source + j * stride + i * sizeof(uint32_t), sizeof(uint32_t));
  };
  int64_t j = 0;
  for (; j + Words::lanes <= columns; j += Words::lanes) {
    int64_t i = 0;
    for (; i + Words::lanes <= words; i += Words::lanes)
      Words::transpose(source + j * stride + i * sizeof(uint32_t), stride, out + i * out_stride + j, out_stride);
    for (; i < words; ++i)
      for (int64_t lane = j; lane < j + Words::lanes; ++lane) copy_word(i, lane);
  }
  for (; j < columns; ++j)
    for (int64_t i = 0; i < words; ++i) copy_word(i, j);
}

#ifdef TDPO_X86
// With registers of 64 bytes, which fill a cache line at a time: twice as fast.
__attribute__((target("avx512f"))) void transpose_words_avx512(const char* source, int64_t stride, int64_t words,
                                                               int64_t columns, uint32_t* out, int64_t out_stride) {
  transpose_words<64>(source, stride, words, columns, out, out_stride);
}
#endif

void transpose_words(const void* source, int64_t stride, int64_t words, int64_t columns, void* out,
                     int64_t out_stride) {
  const auto* const in = static_cast<const char*>(source);
  auto* const result = static_cast<uint32_t*>(out);
#ifdef TDPO_X86
  static const bool has_avx512 = __builtin_cpu_supports("avx512f");
  if (has_avx512) return transpose_words_avx512(in, stride, words, columns, result, out_stride);
#endif
  transpose_words<16>(in, stride, words, columns, result, out_stride);
}

// pack_block for a transposed operand (a weight) of even depth. What is contiguous in its columns, a float or a pair of
// bfloat16, moves as one 32-bit word.
template <typename T>
void pack_transposed_block(const Matrix<T>& b, Range k, Range n, T* packed) {
  transpose_words(b.at(k.begin, n.begin), b.column_stride * sizeof(T), k.size * sizeof(T) / sizeof(uint32_t), n.size,
                  packed, n.size);
}

// Packs rows `m` and columns `k` of `a` into dense rows of `padded_depth` entries, in squares that keep both sides in
// the cache.
template <typename T>
void pack_rows(const Matrix<T>& a, Range m, Range k, int64_t padded_depth, T* packed) {
  using Entries = Square<std::conditional_t<kPaired<T>, uint16_t, uint32_t>>;
  constexpr int64_t side = Entries::lanes;
  if (padded_depth > k.size)
    for (int64_t i = 0; i < m.size; ++i) packed[i * padded_depth + k.size] = T(0);
  for (int64_t i = 0; i < m.size; i += side)
    for (int64_t j = 0; j < k.size; j += side) {
      if (a.row_stride == 1 && i + side <= m.size && j + side <= k.size) {
        Entries::transpose(a.at(m.begin + i, k.begin + j), a.column_stride * sizeof(T), packed + i * padded_depth + j,
                           padded_depth);
      } else {
        for (int64_t row = i; row < std::min(m.size, i + side); ++row)
          for (int64_t column = j; column < std::min(k.size, j + side); ++column)
            packed[row * padded_depth + column] = *a.at(m.begin + row, k.begin + column);
      }
    }
}

// out = a @ b as the transpose of b^T @ a^T, where `b` is a transposed weight and `a` has few rows: the weight is read
// as it lies, and `a` packed in its place. What costs is the transpose of the result, tile by tile, in the cache.
void multiply_exchanged(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  const Matrix<float> weight(b.t()), rows(a.t());  // (columns, depth) and (depth, rows)
  const int64_t depth = weight.columns, count = rows.columns, tiles = (weight.rows + kTileRows - 1) / kTileRows;
  const int64_t bands = (count + kExchangedRows - 1) / kExchangedRows;
  std::vector<float> packed(depth * count);
  for (int64_t band = 0; band < bands; ++band)
    for (int64_t k = 0; k < depth; k += kBlockDepth) {
      const Range m{band * kExchangedRows, std::min(kExchangedRows, count - band * kExchangedRows)};
      const Range block{k, std::min(kBlockDepth, depth - k)};
      pack_transposed_block(rows, block, m, packed.data() + m.begin * depth + k * m.size);
    }
  float* const result = out.data_ptr<float>();
  const int64_t out_stride = out.stride(0);
  at::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    std::vector<float> tile(kTileRows * kExchangedRows);
    for (int64_t n = first * kTileRows; n < std::min(last * kTileRows, weight.rows); n += kTileRows) {
      const int64_t width = std::min(kTileRows, weight.rows - n);
      for (int64_t m = 0; m < count; m += kExchangedRows) {
        const int64_t height = std::min(kExchangedRows, count - m);
        for (int64_t k = 0; k < depth; k += kBlockDepth)
          at::native::cpublas::brgemm(width, height, std::min(kBlockDepth, depth - k), weight.row_stride, height,
                                      height, k > 0, weight.at(n, k), packed.data() + m * depth + k * height,
                                      tile.data(), false);
        transpose_words(tile.data(), height * sizeof(float), height, width, result + m * out_stride + n, out_stride);
      }
    }
    at::native::cpublas::brgemm_release(true);
  });
}

// out (+)= a @ b with brgemm, block by block.
template <typename T>
struct Product {
  Matrix<T> a, b;
  float* out;
  int64_t out_stride;
  bool accumulate;

  // Memory that a thread reuses for its packed operands.
  struct Packed {
    std::vector<T> a, b;
  };

  // Computes rows `m` and columns `n` of `out`.
  void multiply_block(Range m, Range n, Packed& packed) const {
    const int64_t block_depth = a.column_stride == 1 ? kBlockDepth : kWideDepth;
    for (int64_t k_begin = 0; k_begin < a.columns; k_begin += block_depth) {
      const Range k{k_begin, std::min(block_depth, a.columns - k_begin)};
      const int64_t padded_depth = kPaired<T> ? k.size + k.size % 2 : k.size;
      packed.b.resize(padded_depth * n.size);
      if (b.row_stride == 1 && padded_depth == k.size)
        pack_transposed_block(b, k, n, packed.b.data());
      else
        pack_block(b, k, padded_depth, n, packed.b.data());
      for (int64_t row = 0; row < m.size; row += kTileRows)
        multiply_tile({m.begin + row, std::min(kTileRows, m.size - row)}, k, padded_depth, n, packed);
    }
  }

 private:
  // Multiplies rows `m` of `a` with the packed block of `b`.
  void multiply_tile(Range m, Range k, int64_t padded_depth, Range n, Packed& packed) const {
    const T* rows = a.at(m.begin, k.begin);
    int64_t row_stride = a.row_stride;
    if (a.column_stride != 1 || padded_depth != k.size) {
      packed.a.resize(m.size * padded_depth);
      pack_rows(a, m, k, padded_depth, packed.a.data());
      rows = packed.a.data();
      row_stride = padded_depth;
    }
    at::native::cpublas::brgemm(m.size, n.size, padded_depth, row_stride, n.size, out_stride, accumulate || k.begin > 0,
                                rows, packed.b.data(), out + m.begin * out_stride + n.begin, kPaired<T>);
  }
};

template <typename T>
void multiply(const at::Tensor& a, const at::Tensor& b, bool accumulate, const at::Tensor& out) {
  const Product<T> product{Matrix<T>(a), Matrix<T>(b), out.data_ptr<float>(), out.stride(0), accumulate};
  const int64_t rows = a.size(0), columns = b.size(1);
  // Threads share the columns, and the rows too where there are few columns.
  const int64_t threads = at::get_num_threads();
  const int64_t block = product.a.column_stride == 1 ? std::min(kBlockColumns, (columns + threads - 1) / threads)
                                                     : std::min(kWideColumns, columns);
  const int64_t blocks = (columns + block - 1) / block;
  const int64_t bands = blocks >= threads ? 1 : std::min((threads + blocks - 1) / blocks, (rows + 63) / 64);
  const int64_t band = (rows + bands - 1) / bands;
  at::parallel_for(0, blocks * bands, 1, [&](int64_t first, int64_t last) {
    typename Product<T>::Packed packed;
    for (int64_t task = first; task < last; ++task) {
      const int64_t m = task / blocks * band, n = task % blocks * block;
      product.multiply_block({m, std::min(band, rows - m)}, {n, std::min(block, columns - n)}, packed);
    }
    at::native::cpublas::brgemm_release(true);
  });
}

// Logits of few rows: `b` is a transposed weight, and the result takes less memory than it, so that to transpose the
// result costs less than to pack the weight. Of float32 alone: of bfloat16 it is not measured.
bool is_better_exchanged(const at::Tensor& a, const at::Tensor& b) {
  return a.size(0) <= a.size(1) && a.stride(1) == 1 && b.stride(0) == 1 && b.stride(1) >= b.size(0);
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
