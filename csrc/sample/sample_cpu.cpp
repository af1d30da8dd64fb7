// Rows are independent, and a thread takes one at a time. The code drawn is the argmax of logits / temperature + Gumbel
// noise in float64; a pass in float32 finds the few codes that may be it, and only those are computed in float64.
//
// Nothing is sorted: top-k and top-p look for the logit of the last code kept by bisection over the ordered bit
// patterns of floats, each step a count, or a sum of weights, over the row in the cache.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/format.h"
#include "common/rng.h"
#include "cpu/noise.h"
#include "cpu/simd.h"
#include "cpu/vec_math.h"
#include "sample/sample.h"

namespace dalle_fast {
namespace {

constexpr int64_t kChunkCodes = 512;  // scored together
constexpr float kDropped = -std::numeric_limits<float>::infinity();
// More than twice the error of a float32 score within reach of the largest, at most 20 away from it: 1e-5.
constexpr float kMargin = 0x1p-14f;

template <typename S>
void widen_row(const S* logits, int64_t n, float* row) {
  simd([=]() DF_INLINE_LAMBDA {
    for (int64_t i = 0; i < n; ++i) row[i] = widen(logits[i]);
  });
}

// NaN if there is one, else the largest.
float largest(const float* row, int64_t n) {
  return simd([=]() DF_INLINE_LAMBDA {
    float max = kDropped;
    int nans = 0;
#pragma omp simd reduction(max : max) reduction(| : nans)
    for (int64_t i = 0; i < n; ++i) {
      max = row[i] > max ? row[i] : max;
      nans |= row[i] != row[i];
    }
    return nans ? std::numeric_limits<float>::quiet_NaN() : max;
  });
}

// Integers in the order of the floats, and back.
int32_t key_of(float x) {
  const int32_t bits = bits_from_float(x);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}
float float_of(int32_t key) { return float_from_bits(key ^ ((key >> 31) & 0x7FFFFFFF)); }

// The largest float t with sum(t) >= goal, where sum falls as t grows and is below the goal above max. Of counts, any t
// that reaches the goal exactly.
template <typename Sum, typename T>
float last_kept(float max, T goal, Sum sum) {
  int64_t low = key_of(kDropped), high = int64_t{key_of(max)} + 1;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const T reached = sum(float_of(static_cast<int32_t>(middle)));
    (reached >= goal ? low : high) = middle;
    if (std::is_integral_v<T> && reached == goal) break;
  }
  return float_of(static_cast<int32_t>(low));
}

void drop_below(float* row, int64_t n, float last) {
  simd([=]() DF_INLINE_LAMBDA {
    for (int64_t i = 0; i < n; ++i) row[i] = row[i] >= last ? row[i] : kDropped;
  });
}

void keep_top_k(float* row, int64_t n, float max, int64_t k) {
  const float last = last_kept(max, k, [=](float t) {
    return simd([=]() DF_INLINE_LAMBDA {
      int32_t count = 0;
      for (int64_t i = 0; i < n; ++i) count += row[i] >= t;
      return int64_t{count};
    });
  });
  drop_below(row, n, last);
}

// exp(x) for x <= 0 in units of 2^-30, so that sums of weights are exact; 1e-14 before rounding.
DF_ALWAYS_INLINE int32_t scaled_exp(double x) {
  constexpr double kRound = 0x1.8p52;  // adding it rounds to an integer, kept in the low bits
  const double clamped = x < -40.0 ? -40.0 : x;
  const double shifted = clamped * 1.4426950408889634 + kRound;
  const double n = shifted - kRound;
  const double r = (clamped - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;  // x - n ln 2
  double p = 1.0 / 39916800;                                                          // the series up to r^11 / 11!
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  int64_t bits, power;
  std::memcpy(&bits, &p, sizeof(bits));
  std::memcpy(&power, &shifted, sizeof(power));
  bits += static_cast<int64_t>(static_cast<uint64_t>(power) << 52);  // n << 52
  std::memcpy(&p, &bits, sizeof(p));
  return static_cast<int32_t>((p * 0x1p30 + kRound) - kRound);
}

void keep_top_p(float* row, int64_t n, float max, double temperature, double p, int32_t* weights) {
  const int64_t total = simd([=]() DF_INLINE_LAMBDA {
    int64_t sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      weights[i] = scaled_exp((static_cast<double>(row[i]) - max) / temperature);
      sum += weights[i];
    }
    return sum;
  });
  const double goal = p * static_cast<double>(total);
  const auto sum_from = [=](float t) {
    return simd([=]() DF_INLINE_LAMBDA {
      int64_t sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += row[i] >= t ? weights[i] : 0;
      return sum;
    });
  };
  const float last = last_kept(max, goal, sum_from);
  drop_below(row, n, last);
  // Of equal logits, the first ones stay. The next float is not the next number: the zeros are equal.
  int64_t reached = simd([=]() DF_INLINE_LAMBDA {
    int64_t sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += row[i] > last ? weights[i] : 0;
    return sum;
  });
  for (int64_t i = 0; i < n; ++i) {
    if (row[i] != last) continue;
    if (static_cast<double>(reached) >= goal) row[i] = kDropped;
    reached += weights[i];
  }
}

// row[i] = its float32 score; returns the largest of them.
float add_noise(float* row, const float* noise, int64_t n, float max, float inverse_temperature) {
  return simd([=]() DF_INLINE_LAMBDA {
    float best = kDropped;
#pragma omp simd reduction(max : best)
    for (int64_t i = 0; i < n; ++i) {
      row[i] = (row[i] - max) * inverse_temperature + noise[i];
      best = row[i] > best ? row[i] : best;
    }
    return best;
  });
}

double exact_noise(uint64_t seed, int64_t element) {
  const PhiloxWords words = philox(seed, static_cast<uint64_t>(element) / 4);
  return -std::log(-std::log(static_cast<double>(uniform_from_word(words.word[element % 4]))));
}

template <typename LogitAt>
int64_t draw(const Sample& s, uint64_t seed, int64_t first, float* row, float max, LogitAt logit_at) {
  const auto inverse = static_cast<float>(std::clamp<double>(1 / s.temperature, FLT_MIN, FLT_MAX));
  alignas(64) float noise[kChunkCodes];
  float best = std::numeric_limits<float>::lowest();  // above what was dropped
  double best_exact = -std::numeric_limits<double>::infinity();
  int64_t code = -1;
  for (int64_t begin = 0; begin < s.codes; begin += kChunkCodes) {
    const int64_t count = std::min(kChunkCodes, s.codes - begin);
    float* scores = row + begin;
    gumbel_noise_cpu(seed, first + begin, count, noise);
    const float chunk_best = add_noise(scores, noise, count, max, inverse);
    if (chunk_best < best - kMargin) continue;
    best = std::max(best, chunk_best);
    for (int64_t i = 0; i < count; ++i) {
      if (!(scores[i] >= best - kMargin)) continue;
      const double distance = (static_cast<double>(logit_at(begin + i)) - max) / s.temperature;
      const double exact = distance + exact_noise(seed, first + begin + i);
      if (exact > best_exact) best_exact = exact, code = begin + i;
    }
  }
  return code;
}

template <typename S>
int64_t sample_row(const Sample& s, int64_t index, float* row, int32_t* weights) {
  const int64_t n = s.codes;
  const auto* logits = static_cast<const S*>(s.logits) + index * s.row_stride;
  widen_row(logits, n, row);
  const float max = largest(row, n);
  if (!std::isfinite(max)) return -1;
  if (s.top_k < n) keep_top_k(row, n, max, s.top_k);
  if (s.top_p < 1) keep_top_p(row, n, max, s.temperature, s.top_p, weights);
  const auto seed = static_cast<uint64_t>(*s.seed);
  const int64_t first = *s.first + index * s.pitch;
  return draw(s, seed, first, row, max, [=](int64_t i) { return widen(logits[i]); });
}

template <typename S>
void sample_rows(const Sample& params) {
  torch::stable::parallel_for(0, params.rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> row(params.codes);
    std::vector<int32_t> weights(params.top_p < 1 ? params.codes : 0);
    for (int64_t i = begin; i < end; ++i) params.out[i] = sample_row<S>(params, i, row.data(), weights.data());
  });
}

}  // namespace

void sample_cpu(const Sample& params) {
  with_format(params.format, [&](auto element) {
    using S = decltype(element);
    if constexpr (!std::is_same_v<S, double>) sample_rows<S>(params);  // sample.cpp refuses float64
  });
}

}  // namespace dalle_fast
