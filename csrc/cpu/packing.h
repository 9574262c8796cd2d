// Packs operands of matrix products for brgemm (brgemm.cpp): `b` in blocks, rows of `a` where they are not contiguous;
// and rounds what comes of them.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace tdpo {

using at::BFloat16;

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

  int64_t end() const { return begin + size; }
};

// The first `size` of what is left of a range from `begin`.
inline Range part_of(const Range& whole, int64_t begin, int64_t size) {
  return {begin, std::min(size, whole.end() - begin)};
}

inline int64_t ceil_div(int64_t total, int64_t size) { return (total + size - 1) / size; }

// The bfloat16 kernels read `b` in pairs of rows ("VNNI" layout), so their depth is padded to an even number.
template <typename T>
constexpr bool kPaired = sizeof(T) == 2;
template <typename T>
int64_t padded_depth(int64_t depth) {
  return kPaired<T> ? depth + depth % 2 : depth;
}

// One register of kBytes, and a square of entries as wide as it.
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

  // out[i][j] = in[j][i]: after log2(lanes) rounds of interleaving row r with row r + lanes / 2, rows have become
  // columns. `in_stride` in bytes, `out_stride` in entries. Inlined for the same reason.
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

// Transposes a matrix of 32-bit words in squares of kBytes wide, out[i][j] = source[j][i]; whatever is left over, word
// by word. `stride` in bytes, `out_stride` in words. Rows are fetched two squares ahead.
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
    for (; i + Words::lanes <= words; i += Words::lanes) {
      const char* const square = source + j * stride + i * sizeof(uint32_t);
      for (int64_t row = 0; row < Words::lanes; ++row) __builtin_prefetch(square + (2 * Words::lanes + row) * stride);
      Words::transpose(square, stride, out + i * out_stride + j, out_stride);
    }
    for (; i < words; ++i)
      for (int64_t lane = j; lane < j + Words::lanes; ++lane) copy_word(i, lane);
  }
  for (; j < columns; ++j)
    for (int64_t i = 0; i < words; ++i) copy_word(i, j);
}

// Interleaves each pair of rows, `stride` entries apart: out[2 p][j] and [2 p][j + 1] are entry j of the pair's rows,
// which are fetched four pairs ahead.
template <int kBytes>
__attribute__((always_inline)) inline void interleave_pairs(const BFloat16* rows, int64_t stride, int64_t pairs,
                                                            int64_t columns, BFloat16* out) {
  using Entries = Square<uint16_t, kBytes>;
  for (int64_t pair = 0; pair < pairs; ++pair, out += 2 * columns) {
    const BFloat16 *first = rows + 2 * pair * stride, *second = first + stride;
    int64_t j = 0;
    for (; j + Entries::lanes <= columns; j += Entries::lanes) {
      __builtin_prefetch(first + j + 8 * stride);
      __builtin_prefetch(second + j + 8 * stride);
      typename Entries::Register a, b, mixed;
      std::memcpy(&a, first + j, kBytes);
      std::memcpy(&b, second + j, kBytes);
      Entries::interleave(a, b, 0, mixed);
      std::memcpy(out + 2 * j, &mixed, kBytes);
      Entries::interleave(a, b, Entries::lanes / 2, mixed);
      std::memcpy(out + 2 * j + Entries::lanes, &mixed, kBytes);
    }
    for (; j < columns; ++j) out[2 * j] = first[j], out[2 * j + 1] = second[j];
  }
}

// out[j] = values[j], rounded to the nearest, ties to even; as BFloat16's constructor rounds, but for the bits of a
// NaN.
__attribute__((always_inline)) inline void round_entries(const float* values, int64_t count, BFloat16* out) {
  for (int64_t j = 0; j < count; ++j) {
    uint32_t bits;
    std::memcpy(&bits, values + j, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    out[j].x = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
  }
}

#ifdef TDPO_X86
// With registers of 64 bytes, which fill a cache line at a time: twice as fast.
__attribute__((target("avx512f"))) inline void transpose_words_avx512(const char* source, int64_t stride, int64_t words,
                                                                      int64_t columns, uint32_t* out,
                                                                      int64_t out_stride) {
  transpose_words<64>(source, stride, words, columns, out, out_stride);
}
__attribute__((target("avx512f,avx512bw"))) inline void interleave_pairs_avx512(const BFloat16* rows, int64_t stride,
                                                                                int64_t pairs, int64_t columns,
                                                                                BFloat16* out) {
  interleave_pairs<64>(rows, stride, pairs, columns, out);
}
__attribute__((target("avx512f,avx512bw"))) inline void round_entries_avx512(const float* values, int64_t count,
                                                                             BFloat16* out) {
  round_entries(values, count, out);
}
inline bool has_avx512() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
  return has;
}
#endif

inline void transpose_words(const void* source, int64_t stride, int64_t words, int64_t columns, void* out,
                            int64_t out_stride) {
  const auto* const in = static_cast<const char*>(source);
  auto* const result = static_cast<uint32_t*>(out);
#ifdef TDPO_X86
  if (has_avx512()) return transpose_words_avx512(in, stride, words, columns, result, out_stride);
#endif
  transpose_words<16>(in, stride, words, columns, result, out_stride);
}

inline void interleave_pairs(const BFloat16* rows, int64_t stride, int64_t pairs, int64_t columns, BFloat16* out) {
#ifdef TDPO_X86
  if (has_avx512()) return interleave_pairs_avx512(rows, stride, pairs, columns, out);
#endif
  interleave_pairs<16>(rows, stride, pairs, columns, out);
}

inline void round_to_bfloat16(const float* values, int64_t count, BFloat16* out) {
#ifdef TDPO_X86
  if (has_avx512()) return round_entries_avx512(values, count, out);
#endif
  round_entries(values, count, out);
}

// Packs rows `k` and columns `n` of `b`: dense for float, pairs of rows interleaved for bfloat16, the last of an odd
// number with zeros.
template <typename T>
void pack_block(const Matrix<T>& b, Range k, Range n, T* packed) {
  if (b.row_stride == 1 && k.size == padded_depth<T>(k.size)) {
    // A transposed weight. What is contiguous in its columns, a float or a pair of bfloat16, moves as one 32-bit word.
    transpose_words(b.at(k.begin, n.begin), b.column_stride * sizeof(T), k.size * sizeof(T) / sizeof(uint32_t), n.size,
                    packed, n.size);
    return;
  }
  int64_t i = 0;
  if constexpr (kPaired<T>) {
    if (b.column_stride == 1) {
      i = k.size / 2 * 2;
      interleave_pairs(b.at(k.begin, n.begin), b.row_stride, i / 2, n.size, packed);
    }
    for (; i < k.size; i += 2)
      for (int64_t j = 0; j < n.size; ++j) {
        packed[i * n.size + 2 * j] = *b.at(k.begin + i, n.begin + j);
        packed[i * n.size + 2 * j + 1] = i + 1 < k.size ? *b.at(k.begin + i + 1, n.begin + j) : T(0);
      }
  } else {
    for (; i < k.size; ++i)
      for (int64_t j = 0; j < n.size; ++j) packed[i * n.size + j] = *b.at(k.begin + i, n.begin + j);
  }
}

// Packs rows `m` and columns `k` of `a` into dense rows of `padded_depth` entries, in squares: four beside each other,
// which share the cache lines that they read.
template <typename T>
void pack_rows(const Matrix<T>& a, Range m, Range k, T* packed) {
  using Entries = Square<std::conditional_t<kPaired<T>, uint16_t, uint32_t>>;
  constexpr int64_t side = Entries::lanes;
  const int64_t padded = padded_depth<T>(k.size);
  if (padded > k.size)
    for (int64_t i = 0; i < m.size; ++i) packed[i * padded + k.size] = T(0);
  for (int64_t first = 0; first < m.size; first += 4 * side)
    for (int64_t j = 0; j < k.size; j += side)
      for (int64_t i = first; i < std::min(m.size, first + 4 * side); i += side) {
        if (a.row_stride == 1 && i + side <= m.size && j + side <= k.size) {
          Entries::transpose(a.at(m.begin + i, k.begin + j), a.column_stride * sizeof(T), packed + i * padded + j,
                             padded);
        } else {
          for (int64_t row = i; row < std::min(m.size, i + side); ++row)
            for (int64_t column = j; column < std::min(k.size, j + side); ++column)
              packed[row * padded + column] = *a.at(m.begin + row, k.begin + column);
        }
      }
}

}  // namespace tdpo
