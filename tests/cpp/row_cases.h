// Row states and gradients for any shape, alignment and dtype, against the scalar code of row_state.h in float64.
// Shared by the tests of the CPU kernels and of the CUDA kernels (on the emulator).
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/cuda/device.h"  // to_real and Rounded

namespace row_cases {

using namespace tdpo;
using tdpo::cuda::to_real;
inline int failures = 0;

inline void expect_near(double got, double wanted, double tolerance, const char* what) {
  if (got == wanted || std::fabs(got - wanted) <= tolerance * (1 + std::fabs(wanted))) return;
  std::printf("FAILED: %s: %.9g, wanted %.9g\n", what, got, wanted);
  ++failures;
}

template <typename T>
struct Kind;
template <>
struct Kind<float> {
  static constexpr DType dtype = DType::f32;
  static constexpr double rounding = 1e-6;
};
template <>
struct Kind<double> {
  static constexpr DType dtype = DType::f64;
  static constexpr double rounding = 1e-12;
};
template <>
struct Kind<bf16> {
  static constexpr DType dtype = DType::bf16;
  static constexpr double rounding = 4e-3;
};
template <>
struct Kind<f16> {
  static constexpr DType dtype = DType::f16;
  static constexpr double rounding = 5e-4;
};

struct Shape {
  int64_t rows, vocab;
  int64_t slices = 1;
  int64_t z_offset = 0, r_offset = 0, out_offset = 0;  // entries from a 16-byte boundary
  int64_t padding = 0;                                 // entries between rows
  double softcap = 0, temperature = 1;
  double ref_offset = 0;  // of all reference logits
};

// A dense matrix of rows, `stride` entries apart.
template <typename T>
RowView row_view(T* data, int64_t stride) {
  return {data, 1, stride, stride};
}

// Parameters of a row for each label, without temperature, softcap or slices.
template <typename T>
DivergenceParams plain_params(T* z, T* r, const std::vector<int64_t>& labels, int64_t vocab) {
  return {
      .logits = row_view(z, vocab),
      .ref_logits = row_view(r, vocab),
      .labels = labels.data(),
      .rows = int64_t(labels.size()),
      .vocab = vocab,
      .vocab_start = 0,
      .vocab_size = vocab,
      .ignore_index = -100,
      .temperature = 1,
      .softcap = 0,
      .reverse_kl = false,
      .dtype = Kind<T>::dtype,
  };
}

// Checks a backend on one shape: values, and gradients both out of place, into poisoned memory, and in place. The
// buffers end where the last row ends, so a sanitizer finds accesses past it. A backend has states(params, slices),
// which returns one merged state per row, and gradient(params, grad).
template <typename T, bool kReverse, typename Backend>
void check_direction(const Shape& shape, const Backend& backend) {
  using Real = RealOf<T>;
  const auto [rows, vocab, slices, z_offset, r_offset, out_offset, padding, softcap, temperature, ref_offset] = shape;
  const int64_t stride = vocab + padding;
  std::mt19937 random(17);
  std::normal_distribution<double> normal;
  const int64_t size = (rows - 1) * stride + vocab;
  std::vector<T> z(z_offset + size), r(r_offset + size);
  T* const z_data = z.data() + z_offset;
  T* const r_data = r.data() + r_offset;
  for (int64_t i = 0; i < size; ++i) {
    z_data[i] = cuda::Rounded<T>::of(Real(2 * normal(random)));
    r_data[i] = cuda::Rounded<T>::of(Real(to_real(z_data[i]) + 0.3 * normal(random) + ref_offset));
  }
  std::vector<int64_t> labels(rows);
  for (int64_t row = 0; row < rows; ++row) labels[row] = row == 1 ? -100 : (row * 37 + 3) % vocab + 5;
  if (rows == 4) labels[3] = vocab - 1 + 5;  // the last entry
  if (vocab > 3) {
    const int64_t last_row = (rows - 1) * stride;
    z_data[2] = r_data[2] = cuda::Rounded<T>::of(Real(-INFINITY));  // masked in both
    (kReverse ? z_data : r_data)[last_row + vocab / 2] = cuda::Rounded<T>::of(Real(-INFINITY));
    for (auto& label : labels)
      if (label == 7 || label == vocab / 2 + 5) label = 5;  // neither of the masked entries
  }
  const DivergenceParams params{
      .logits = row_view(z_data, stride),
      .ref_logits = row_view(r_data, stride),
      .labels = labels.data(),
      .rows = rows,
      .vocab = vocab,
      .vocab_start = 5,
      .vocab_size = vocab + 5,
      .ignore_index = -100,
      .temperature = temperature,
      .softcap = softcap,
      .reverse_kl = kReverse,
      .dtype = Kind<T>::dtype,
  };

  const auto merged = backend.template states<RowState<Real, kReverse>>(params, slices);

  std::vector<Real> logps_grad(rows), kl_grad(rows);
  for (int64_t row = 0; row < rows; ++row) {
    logps_grad[row] = Real(normal(random));
    kl_grad[row] = row == 2 ? Real(0) : Real(normal(random));
  }
  // Out of place into poisoned memory, then in place.
  std::vector<T> out(out_offset + size, cuda::Rounded<T>::of(Real(NAN)));
  GradientParams grad{
      .states = merged.data(),
      .logps_grad = logps_grad.data(),
      .kl_grad = kl_grad.data(),
      .out = row_view(out.data() + out_offset, stride),
      .out_dtype = Kind<T>::dtype,
  };
  backend.gradient(params, grad);
  std::vector<T> in_place = z;
  DivergenceParams in_place_params = params;
  in_place_params.logits.data = in_place.data() + z_offset;
  grad.out.data = in_place_params.logits.data;
  backend.gradient(in_place_params, grad);

  const double value_tolerance = sizeof(Real) == 8 ? 1e-12 : 3e-6;
  for (int64_t row = 0; row < rows; ++row) {
    const auto capped = [softcap = softcap](T x) {
      return softcap > 0 ? softcap * std::tanh(to_real(x) / softcap) : double(to_real(x));
    };
    auto state = RowState<double, kReverse>::empty();
    for (int64_t v = 0; v < vocab; ++v)
      state.update(capped(z_data[row * stride + v]), capped(r_data[row * stride + v]),
                   InvTemperature<double>(temperature));
    const int64_t label = labels[row] - 5;
    const bool ignored = labels[row] == -100;
    if (!ignored)
      state.z_label = capped(z_data[row * stride + label]), state.r_label = capped(r_data[row * stride + label]);
    const auto wanted = ignored ? TokenValues<double>{} : state.finalize(InvTemperature<double>(temperature));
    if (!ignored) {
      const auto got = merged[row].finalize(InvTemperature<Real>(temperature));
      expect_near(got.logp, wanted.logp, value_tolerance, "logp");
      expect_near(got.ref_logp, wanted.ref_logp, value_tolerance, "ref_logp");
      expect_near(got.kl, wanted.kl, value_tolerance, "kl");
      expect_near(got.entropy, wanted.entropy, value_tolerance, "entropy");
      expect_near(got.correct, wanted.correct, 0, "correct");
      expect_near(got.tokens, 1, 0, "tokens");
    }
    const RowGradient<double, kReverse> exact(state, logps_grad[row], kl_grad[row],
                                              InvTemperature<double>(temperature));
    for (int64_t v = 0; v < vocab; ++v) {
      const double z_entry = capped(z_data[row * stride + v]);
      double dz = exact.template at<ScalarMath<double>, true>(z_entry, capped(r_data[row * stride + v]));
      if (v == label) dz += exact.label_extra;
      if (softcap > 0) dz *= 1 - z_entry / softcap * z_entry / softcap;
      if (ignored) dz = 0;
      const T got = out[out_offset + row * stride + v], got_in_place = in_place[z_offset + row * stride + v];
      expect_near(to_real(got), dz, Kind<T>::rounding, "gradient");
      if (std::memcmp(&got, &got_in_place, sizeof(T)) != 0) expect_near(0, 1, 0, "in place differs");
    }
    for (int64_t v = vocab; v < stride && row + 1 < rows; ++v)
      if (!std::isnan(double(to_real(out[out_offset + row * stride + v])))) expect_near(0, 1, 0, "wrote past a row");
  }
}

template <typename T, typename Backend>
void check(const Shape& shape, const Backend& backend) {
  check_direction<T, false>(shape, backend);
  check_direction<T, true>(shape, backend);
}

}  // namespace row_cases
