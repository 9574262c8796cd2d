// The row state alone: grouping and order don't matter, empty() is the identity, edge values are as defined, and every
// value matches a direct computation in long double.
#include "../../csrc/row_state.h"

#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

namespace {

using tdpo::InvTemperature;
using tdpo::RowState;
int failures = 0;

void expect(bool good, const char* what, double got = 0, double wanted = 0) {
  if (good) return;
  std::printf("FAILED: %s (got %.17g, wanted %.17g)\n", what, got, wanted);
  ++failures;
}

void expect_near(double got, double wanted, double tolerance, const char* what) {
  const bool same = got == wanted || std::fabs(got - wanted) <= tolerance * (1 + std::fabs(wanted));
  expect(same, what, got, wanted);
}

struct Row {
  std::vector<double> z, r;
  size_t label;
};

Row random_row(size_t vocab, double spread, double perturbation, unsigned seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  Row row{std::vector<double>(vocab), std::vector<double>(vocab), seed % vocab};
  for (size_t v = 0; v < vocab; ++v) {
    row.z[v] = double(float(spread * normal(random)));
    row.r[v] = double(float(row.z[v] + perturbation * normal(random)));
  }
  return row;
}

template <typename Real, bool kReverse = false>
RowState<Real, kReverse> state_of(const Row& row, size_t begin, size_t end, double temperature = 1) {
  auto state = RowState<Real, kReverse>::empty();
  for (size_t v = begin; v < end; ++v) state.update(Real(row.z[v]), Real(row.r[v]), InvTemperature<Real>(temperature));
  if (row.label >= begin && row.label < end) {
    state.z_label = Real(row.z[row.label]);
    state.r_label = Real(row.r[row.label]);
  }
  return state;
}

// Straight from the definitions, in long double.
tdpo::TokenValues<double> direct(const Row& row, double temperature = 1) {
  long double z_max = -INFINITY, r_max = -INFINITY, z_sum = 0, r_sum = 0, kl = 0, entropy = 0;
  for (double z : row.z) z_max = std::max<long double>(z_max, z / temperature);
  for (double r : row.r) r_max = std::max<long double>(r_max, r / temperature);
  for (double z : row.z) z_sum += std::exp(z / temperature - z_max);
  for (double r : row.r) r_sum += std::exp(r / temperature - r_max);
  const long double z_lse = z_max + std::log(z_sum), r_lse = r_max + std::log(r_sum);
  for (size_t v = 0; v < row.z.size(); ++v) {
    const long double log_p = row.z[v] / (long double)temperature - z_lse;
    const long double log_q = row.r[v] / (long double)temperature - r_lse;
    if (std::exp(log_q) > 0) kl += std::exp(log_q) * (log_q - log_p);
    if (std::exp(log_p) > 0) entropy -= std::exp(log_p) * log_p;
  }
  return {double(row.z[row.label] / temperature - z_lse),
          double(row.r[row.label] / temperature - r_lse),
          double(kl),
          double(entropy),
          double(row.z[row.label] == *std::max_element(row.z.begin(), row.z.end())),
          1};
}

template <typename Real>
void check_values(const RowState<Real>& state, const Row& row, double tolerance, double kl_tolerance, const char* what,
                  double temperature = 1) {
  const auto got = state.finalize(InvTemperature<Real>(temperature));
  const auto wanted = direct(row, temperature);
  expect_near(got.logp, wanted.logp, tolerance, what);
  expect_near(got.ref_logp, wanted.ref_logp, tolerance, what);
  expect_near(got.entropy, wanted.entropy, tolerance, what);
  expect_near(got.correct, wanted.correct, 0, what);
  expect_near(got.tokens, wanted.tokens, 0, what);
  const bool kl_good = std::fabs(got.kl - wanted.kl) <= kl_tolerance * wanted.kl + 1e-12;
  expect(kl_good, what, got.kl, wanted.kl);
}

void values_match_definitions() {
  for (size_t vocab : {1, 2, 7, 507, 5000})
    for (double perturbation : {1e-3, 1e-1, 1.0, 5.0})
      for (double temperature : {1.0, 0.7}) {
        const Row row = random_row(vocab, 3, perturbation, unsigned(vocab));
        check_values(state_of<double>(row, 0, vocab, temperature), row, 1e-12, 1e-8, "float64 values", temperature);
        check_values(state_of<float>(row, 0, vocab, temperature), row, 1e-5, 1e-3, "float32 values", temperature);
      }
}

void grouping_does_not_matter() {
  for (double perturbation : {1e-3, 1.0, 8.0}) {
    const Row row = random_row(999, 4, perturbation, 3);
    std::vector<RowState<double>> slices;
    for (size_t begin = 0; begin < 999; begin += 37)
      slices.push_back(state_of<double>(row, begin, std::min<size_t>(999, begin + 37)));
    auto left = RowState<double>::empty();
    for (const auto& slice : slices) left.merge(slice);
    auto right = RowState<double>::empty();
    for (size_t i = slices.size(); i-- > 0;) {
      auto merged = slices[i];
      merged.merge(right);
      right = merged;
    }
    std::shuffle(slices.begin(), slices.end(), std::mt19937(7));
    auto shuffled = RowState<double>::empty();
    for (const auto& slice : slices) shuffled.merge(slice);
    for (const auto& state : {left, right, shuffled}) check_values(state, row, 1e-12, 1e-8, "merged slices");
  }
}

void empty_is_the_identity() {
  const Row row = random_row(100, 2, 0.5, 5);
  const auto state = state_of<double>(row, 0, 100);
  auto before = RowState<double>::empty();
  before.merge(state);
  auto after = state;
  after.merge(RowState<double>::empty());
  for (const auto& merged : {before, after})
    for (int i = 0; i < tdpo::kRowStateSize; ++i)
      expect(reinterpret_cast<const double*>(&merged)[i] == reinterpret_cast<const double*>(&state)[i], "identity");
}

template <typename Real>
void edge_values() {
  const double inf = INFINITY;
  const auto value = [](const Row& row) {
    auto first = state_of<Real>(row, 0, 2), rest = state_of<Real>(row, 2, row.z.size());
    first.merge(rest);
    const auto split = first.finalize(InvTemperature<Real>(1));
    const auto whole = state_of<Real>(row, 0, row.z.size()).finalize(InvTemperature<Real>(1));
    const bool both_nan = std::isnan(split.kl) && std::isnan(whole.kl);
    expect(both_nan || split.kl == whole.kl || std::fabs(split.kl - whole.kl) < 1e-5, "split equals whole", split.kl,
           whole.kl);
    return whole;
  };
  // Both masked: as if the entry did not exist.
  expect_near(value({{1, -inf, 2}, {1.5, -inf, 2}, 0}).kl, direct({{1, 2}, {1.5, 2}, 0}).kl, 1e-5, "masked in both");
  // No reference mass: contributes nothing to the KL's sum.
  expect_near(value({{1, 0.5, 2}, {1.5, -inf, 2}, 0}).kl, direct({{1, 0.5, 2}, {1.5, -1e4, 2}, 0}).kl, 1e-5, "q = 0");
  expect_near(value({{1, -inf, 2}, {1.5, -1e4, 2}, 0}).kl, direct({{1, 2}, {1.5, 2}, 0}).kl, 1e-5, "q underflows");
  // Reference mass where the policy has none.
  expect(value({{1, -inf, 2}, {1.5, 1, 2}, 0}).kl == inf, "p = 0 where q > 0");
  expect(value({{-inf, -inf, 2}, {1.5, 1, 2}, 2}).kl == inf, "p = 0 throughout a slice");
  expect(std::isfinite(value({{-inf, -inf, 2}, {-inf, -inf, 2}, 2}).kl), "a slice masked in both");
  expect(std::isfinite(value({{3, 1, -inf}, {3, 1, -inf}, 0}).kl), "the last slice masked in both");
  expect_near(value({{1e4, 0, -1e4}, {1e4, 0, -1e4}, 0}).kl, 0, 1e-6, "extreme but equal");
  expect_near(value({{100, 0, 0}, {0, 0, 100}, 0}).kl, 100, 1e-5, "far apart");
  expect(std::isnan(value({{NAN, 0, 1}, {0, 0, 1}, 0}).kl), "NaN is not hidden");
}

void small_kl_keeps_its_digits() {
  const Row row = random_row(5000, 2, 1e-4, 11);
  const double wanted = direct(row).kl;
  const double got = state_of<float>(row, 0, 5000).finalize(InvTemperature<float>(1)).kl;
  expect(std::fabs(got - wanted) < 1e-4 * wanted, "float32 KL of 1e-8", got, wanted);
}

// A reference with an offset: `r` is rounded to the digits that the offset leaves, and nothing else is lost.
void offsets_lose_no_digits() {
  for (double offset : {30.0, -30.0, 1e4, -1e6})
    for (double temperature : {1.0, 0.01, 20.0}) {
      Row row = random_row(5000, 2 * temperature, 0.3 * temperature, 13);
      for (double& r : row.r) r = double(float(r + offset * temperature));
      auto exchanged = row;
      std::swap(exchanged.z, exchanged.r);
      for (const Row& each : {row, exchanged}) {
        const double wanted = direct(each, temperature).kl;
        const double got = state_of<float>(each, 0, 5000, temperature).finalize(InvTemperature<float>(temperature)).kl;
        expect(std::fabs(got - wanted) < 1e-5 * wanted, "KL beside an offset", got, wanted);
      }
    }
}

// The reverse KL is the forward one of the exchanged rows, everywhere: merges, one sum alone rising, no mass.
template <typename Real>
void reverse_is_forward_of_exchanged_rows() {
  const double inf = INFINITY;
  std::vector<Row> rows{random_row(999, 2, 1e-3, 3), random_row(999, 4, 2, 4), {{1, 2, 1, 2}, {1, -inf, 2, 1}, 2}};
  rows.push_back(rows[0]);
  rows.back().z[300] = 30, rows.back().r[300] = 1, rows.back().z[700] = rows.back().r[700] = 33;
  for (const Row& row : rows) {
    const size_t size = row.z.size(), cut = size / 3;
    auto exchanged = row;
    std::swap(exchanged.z, exchanged.r);
    auto forward = state_of<Real>(exchanged, 0, cut);
    forward.merge(state_of<Real>(exchanged, cut, size));
    auto reverse = state_of<Real, true>(row, 0, cut);
    reverse.merge(state_of<Real, true>(row, cut, size));
    const auto wanted = forward.finalize(InvTemperature<Real>(1)), got = reverse.finalize(InvTemperature<Real>(1));
    const double tolerance = sizeof(Real) == 8 ? 1e-12 : 1e-6;
    expect_near(got.kl, wanted.kl, tolerance * wanted.kl, "reverse KL");
    expect_near(got.logp, wanted.ref_logp, tolerance, "logp of the reverse state");
    expect_near(got.ref_logp, wanted.logp, tolerance, "ref_logp of the reverse state");
    expect_near(got.entropy, direct(row).entropy, 10 * tolerance, "entropy of the reverse state");
  }
}

// A spike of the policy alone, before one that both share, moves the sums out and back.
void peaks_do_not_depend_on_the_order() {
  for (double height : {2.0, 15.0, 60.0}) {
    Row row = random_row(20000, 1, 0, 23);
    row.z[7000] = height, row.r[7000] = 0;
    row.z[15000] = row.r[15000] = height + 5;
    const double wanted = direct(row).kl;
    auto front = state_of<float>(row, 0, 20000), merged = state_of<float>(row, 0, 6000);
    merged.merge(state_of<float>(row, 6000, 9000));
    merged.merge(state_of<float>(row, 9000, 20000));
    std::reverse(row.z.begin(), row.z.end()), std::reverse(row.r.begin(), row.r.end());
    const auto back = state_of<float>(row, 0, 20000);
    for (const auto& state : {front, merged, back}) {
      const double got = state.finalize(InvTemperature<float>(1)).kl;
      // One accumulator for 20,000 entries rounds more than the kernels do.
      expect(std::fabs(got - wanted) <= 2e-4 * wanted + 1e-9, "a peaked row's KL", got, wanted);
    }
  }
}

// Entries far below everything have no mass, whether they come alone, first or last; maxima far above are noticed.
void masked_slices_have_no_mass() {
  const double mask = -1e30;
  const Row row{{mask, mask, 1, 0.5, mask}, {mask, mask, 1.5, 2, mask}, 3};
  const double wanted = direct({{1, 0.5}, {1.5, 2}, 1}).kl;
  for (size_t cut : {1, 2, 3, 4}) {
    auto state = state_of<float>(row, 0, cut);
    state.merge(state_of<float>(row, cut, 5));
    expect_near(state.finalize(InvTemperature<float>(1)).kl, wanted, 1e-6, "KL beside masked slices");
    expect(!state.is_out_of_range(), "a masked row is in range");
  }
  for (double size : {-1e30, 1e9, 3e38}) {
    const Row far{{size, size}, {0, 0}, 0}, far_reference{{0, 0}, {size, size}, 0};
    expect(state_of<float>(far, 0, 2).is_out_of_range(), "logits out of range");
    expect(state_of<float>(far_reference, 0, 2).is_out_of_range(), "reference logits out of range");
  }
}

}  // namespace

int main() {
  values_match_definitions();
  grouping_does_not_matter();
  empty_is_the_identity();
  edge_values<float>();
  edge_values<double>();
  small_kl_keeps_its_digits();
  offsets_lose_no_digits();
  reverse_is_forward_of_exchanged_rows<float>();
  reverse_is_forward_of_exchanged_rows<double>();
  peaks_do_not_depend_on_the_order();
  masked_slices_have_no_mass();
  if (failures == 0) std::puts("row_state_test: passed");
  return failures == 0 ? 0 : 1;
}
