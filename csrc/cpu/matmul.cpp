// out (+)= a @ b with a float32 result. torch's CPU products round their result to the operands' dtype, which costs the
// KL its signal; here bfloat16 operands leave their accumulators as they are, through torch's batch-reduce kernels
// where the processor multiplies bfloat16, and through float32 copies of small blocks elsewhere. Float32 operands go
// the same way: where `b` is a transposed weight it is faster than torch's own product.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

namespace tdpo {
namespace {

using at::BFloat16;
constexpr int64_t kTileRows = 128, kBlockColumns = 384, kBlockDepth = 512;
// Where `a` must be copied too, wider blocks copy it less often.
constexpr int64_t kWideColumns = 768, kWideDepth = 256;
constexpr int64_t kCopied = 2048;  // side of the blocks that multiply_copies takes

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

// bfloat16 is multiplied in pairs of depth.
template <typename T>
constexpr bool kPaired = sizeof(T) == 2;

template <typename T>
bool has_kernels() {
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

// out[i][j] = in[j][i] for a square of one register's lanes, by interleaving: after log2(lanes) rounds of pairing row r
// with row r + lanes / 2, entry by entry, rows have become columns.
template <typename T>
struct Square {
  static constexpr int lanes = 16 / sizeof(T);
  typedef T Register __attribute__((vector_size(16)));
  typedef std::conditional_t<sizeof(T) == 2, int16_t, int32_t> Index;
  typedef Index Indices __attribute__((vector_size(16)));

  // `in_stride` in bytes, `out_stride` in entries.
  static void transpose(const void* in, int64_t in_stride, void* out, int64_t out_stride) {
    Indices low, high;
    for (int i = 0; i < lanes; ++i) {
      low[i] = i / 2 + i % 2 * lanes;
      high[i] = low[i] + lanes / 2;
    }
    Register rows[lanes], mixed[lanes];
    for (int r = 0; r < lanes; ++r) std::memcpy(&rows[r], static_cast<const char*>(in) + r * in_stride, 16);
    for (int round = lanes; round > 1; round /= 2) {
      for (int r = 0; r < lanes / 2; ++r) {
        mixed[2 * r] = __builtin_shuffle(rows[r], rows[r + lanes / 2], low);
        mixed[2 * r + 1] = __builtin_shuffle(rows[r], rows[r + lanes / 2], high);
      }
      for (int r = 0; r < lanes; ++r) rows[r] = mixed[r];
    }
    for (int r = 0; r < lanes; ++r) std::memcpy(static_cast<T*>(out) + r * out_stride, &rows[r], 16);
  }
};

// Copies b[k0:k0+depth, n0:n0+columns], for bfloat16 with pairs of rows interleaved, as the dot-product instructions
// read them; then `padded` (even) rows are written.
void pack_block(const Matrix<float>& b, int64_t k0, int64_t depth, int64_t, int64_t n0, int64_t columns,
                float* packed) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t n = 0; n < columns; ++n) packed[k * columns + n] = *b.at(k0 + k, n0 + n);
}
void pack_block(const Matrix<BFloat16>& b, int64_t k0, int64_t depth, int64_t padded, int64_t n0, int64_t columns,
                BFloat16* packed) {
  for (int64_t k = 0; k < padded; k += 2) {
    BFloat16* row = packed + k * columns;
    const BFloat16 *first = b.at(k0 + k, n0), *second = b.at(k0 + k + 1, n0);
    const bool both = k + 1 < depth;
    const int64_t step = b.column_stride;
    if (step == 1 && both) {
      for (int64_t n = 0; n < columns; ++n) row[2 * n] = first[n], row[2 * n + 1] = second[n];
    } else {
      for (int64_t n = 0; n < columns; ++n) {
        row[2 * n] = first[n * step];
        row[2 * n + 1] = both ? second[n * step] : BFloat16(0);
      }
    }
  }
}

// The same for a transposed operand (a weight): what lies side by side in it moves as one word, a float or a pair.
template <typename T>
void pack_transposed_block(const Matrix<T>& b, int64_t k0, int64_t depth, int64_t n0, int64_t columns, T* packed) {
  using Words = Square<uint32_t>;
  const auto* source = reinterpret_cast<const char*>(b.at(k0, n0));
  const int64_t stride = b.column_stride * sizeof(T), words = depth * sizeof(T) / sizeof(uint32_t);
  auto* const out = reinterpret_cast<uint32_t*>(packed);
  const auto one = [&](int64_t k, int64_t n) {
    std::memcpy(out + k * columns + n, source + n * stride + k * sizeof(uint32_t), sizeof(uint32_t));
  };
  int64_t n = 0;
  for (; n + Words::lanes <= columns; n += Words::lanes) {
    int64_t k = 0;
    for (; k + Words::lanes <= words; k += Words::lanes)
      Words::transpose(source + n * stride + k * sizeof(uint32_t), stride, out + k * columns + n, columns);
    for (; k < words; ++k)
      for (int64_t i = n; i < n + Words::lanes; ++i) one(k, i);
  }
  for (; n < columns; ++n)
    for (int64_t k = 0; k < words; ++k) one(k, n);
}

// Copies a[m0:m0+rows, k0:k0+depth] to rows of `padded` entries, in squares that keep both sides in the cache.
template <typename T>
void pack_rows(const Matrix<T>& a, int64_t m0, int64_t rows, int64_t k0, int64_t depth, int64_t padded, T* packed) {
  using Entries = Square<std::conditional_t<kPaired<T>, uint16_t, uint32_t>>;
  constexpr int64_t kSquare = Entries::lanes;
  if (padded > depth)
    for (int64_t m = 0; m < rows; ++m) packed[m * padded + depth] = T(0);
  for (int64_t m = 0; m < rows; m += kSquare)
    for (int64_t k = 0; k < depth; k += kSquare) {
      if (a.row_stride == 1 && m + kSquare <= rows && k + kSquare <= depth) {
        Entries::transpose(a.at(m0 + m, k0 + k), a.column_stride * sizeof(T), packed + m * padded + k, padded);
      } else {
        for (int64_t i = m; i < std::min(rows, m + kSquare); ++i)
          for (int64_t j = k; j < std::min(depth, k + kSquare); ++j) packed[i * padded + j] = *a.at(m0 + i, k0 + j);
      }
    }
}

template <typename T>
void multiply_block(const Matrix<T>& a, const Matrix<T>& b, bool accumulate, float* out, int64_t out_stride,
                    int64_t m_begin, int64_t m_end, int64_t n0, int64_t columns, std::vector<T>& a_pack,
                    std::vector<T>& b_pack) {
  const int64_t block_depth = a.column_stride == 1 ? kBlockDepth : kWideDepth;
  for (int64_t k0 = 0; k0 < a.columns; k0 += block_depth) {
    const int64_t depth = std::min(block_depth, a.columns - k0), padded = kPaired<T> ? depth + depth % 2 : depth;
    b_pack.resize(padded * columns);
    if (b.row_stride == 1 && padded == depth)
      pack_transposed_block(b, k0, depth, n0, columns, b_pack.data());
    else
      pack_block(b, k0, depth, padded, n0, columns, b_pack.data());
    for (int64_t m = m_begin; m < m_end; m += kTileRows) {
      const int64_t rows = std::min(kTileRows, m_end - m);
      const bool direct = a.column_stride == 1 && padded == depth;
      if (!direct) {
        a_pack.resize(rows * padded);
        pack_rows(a, m, rows, k0, depth, padded, a_pack.data());
      }
      at::native::cpublas::brgemm(rows, columns, padded, direct ? a.row_stride : padded, columns, out_stride,
                                  accumulate || k0 > 0, direct ? a.at(m, k0) : a_pack.data(), b_pack.data(),
                                  out + m * out_stride + n0, kPaired<T>);
    }
  }
}

template <typename T>
void multiply(const at::Tensor& a_tensor, const at::Tensor& b_tensor, bool accumulate, const at::Tensor& out) {
  const Matrix<T> a(a_tensor), b(b_tensor);
  // Columns are shared among threads, and rows too where there are few columns.
  const int64_t threads = at::get_num_threads();
  const int64_t columns = a.column_stride == 1 ? std::min(kBlockColumns, (b.columns + threads - 1) / threads)
                                               : std::min(kWideColumns, b.columns);
  const int64_t blocks = (b.columns + columns - 1) / columns;
  const int64_t bands = blocks >= threads ? 1 : std::min((threads + blocks - 1) / blocks, (a.rows + 63) / 64);
  const int64_t band = (a.rows + bands - 1) / bands;
  float* const result = out.data_ptr<float>();
  at::parallel_for(0, blocks * bands, 1, [&](int64_t first, int64_t last) {
    std::vector<T> a_pack, b_pack;
    for (int64_t task = first; task < last; ++task) {
      const int64_t n0 = task % blocks * columns, m0 = task / blocks * band;
      multiply_block(a, b, accumulate, result, out.stride(0), m0, std::min(a.rows, m0 + band), n0,
                     std::min(columns, b.columns - n0), a_pack, b_pack);
    }
    at::native::cpublas::brgemm_release(true);
  });
}

// Float32 copies of one block at a time, multiplied by torch.
void multiply_copies(const at::Tensor& a, const at::Tensor& b, bool accumulate, const at::Tensor& out) {
  const auto block = [](const at::Tensor& t, int64_t row, int64_t column) {
    return t.narrow(0, row, std::min(kCopied, t.size(0) - row))
        .narrow(1, column, std::min(kCopied, t.size(1) - column));
  };
  if (!accumulate) out.zero_();
  for (int64_t m = 0; m < a.size(0); m += kCopied)
    for (int64_t k = 0; k < a.size(1); k += kCopied) {
      const auto left = block(a, m, k).to(at::kFloat);
      for (int64_t n = 0; n < b.size(1); n += kCopied) block(out, m, n).addmm_(left, block(b, k, n).to(at::kFloat));
    }
}

void matmul_float32(const at::Tensor& a, const at::Tensor& b, bool accumulate, const at::Tensor& out) {
  TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "a ", a.sizes(), " and b ", b.sizes(),
                    " are not matrices that multiply");
  TORCH_CHECK_TYPE(a.scalar_type() == b.scalar_type() && a.scalar_type() != at::kDouble, "a has dtype ",
                   a.scalar_type(), " and b ", b.scalar_type(), "; both must be bfloat16, float16 or float32");
  TORCH_CHECK_VALUE(out.dim() == 2 && out.size(0) == a.size(0) && out.size(1) == b.size(1) && out.stride(1) == 1,
                    "out has shape ", out.sizes(), " and strides ", out.strides());
  TORCH_CHECK_TYPE(out.scalar_type() == at::kFloat, "out has dtype ", out.scalar_type(), "; it must be float32");
  if (out.numel() == 0) return;
  if (a.size(1) == 0) {
    if (!accumulate) out.zero_();
  } else if (a.scalar_type() == at::kBFloat16 && has_kernels<BFloat16>()) {
    multiply<BFloat16>(a, b, accumulate, out);
  } else if (a.scalar_type() == at::kFloat && has_kernels<float>()) {
    multiply<float>(a, b, accumulate, out);
  } else {
    multiply_copies(a, b, accumulate, out);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(tdpo_ext, CPU, m) { m.impl("matmul_float32", &matmul_float32); }

}  // namespace tdpo
