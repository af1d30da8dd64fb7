// The passes over a tile: noisy logits, their exponentials, and gradients.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/noise.h"
#include "cpu/simd.h"
#include "cpu/vec_math.h"
#include "gumbel/cpu_tile.h"
#include "gumbel/gumbel.h"

namespace dalle_fast::gumbel {

// At tau = 1 there is a short cut: exp(logit + noise) = exp(logit) / E with E = -log u, and the KL needs exp(logit) as
// well: one exponential and one logarithm per element instead of two of each.
inline bool short_cut(const GumbelShape& s) { return s.tau == 1; }

// Running maxima and sums of each pixel over the codes so far, [pixels] each.
template <typename T>
struct PixelSums {
  T* best;             // largest noisy logit; in the short cut exp(noisy - plain_max), until finish_best
  T* noisy_sum;        // of exp((noisy - reference) / tau)
  T* plain_max;        // largest logit
  T* plain_sum;        // of exp(logit - plain_max)
  T* plain_weighted;   // of the same, weighted by (logit - plain_max)
  int32_t* code;       // of best
  const T* reference;  // best, or plain_max in a short cut

  void start(int64_t pixels, int64_t first_code) const {
    // Finite, so that a pixel whose logits are all -inf so far gives zeros and not NaN.
    std::fill_n(best, pixels, std::numeric_limits<T>::lowest());
    std::fill_n(plain_max, pixels, std::numeric_limits<T>::lowest());
    std::fill_n(code, pixels, static_cast<int32_t>(first_code));
    std::fill_n(noisy_sum, pixels, T(0));
    std::fill_n(plain_sum, pixels, T(0));
    std::fill_n(plain_weighted, pixels, T(0));
  }
};

template <int64_t kRows, typename T>
DF_ALWAYS_INLINE void noisy_group_body(TileRows<const T> logits, const uint32_t* words, int64_t code, int64_t pixels,
                                       T* noisy, PixelSums<T> sums) {
#pragma omp simd
  for (int64_t p = 0; p < pixels; ++p) {
    T best = sums.best[p], plain_max = sums.plain_max[p];
    int32_t best_code = sums.code[p];
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r) {
      const T logit = logits.data[r * logits.stride + p];
      const T value = logit + static_cast<T>(gumbel_from_word(words[r * kTilePixels + p]));
      noisy[r * kTilePitch + p] = value;
      best_code = value > best ? static_cast<int32_t>(code + r) : best_code;
      best = value > best ? value : best;
      plain_max = logit > plain_max ? logit : plain_max;
    }
    sums.best[p] = best;
    sums.plain_max[p] = plain_max;
    sums.code[p] = best_code;
  }
}

template <int64_t kRows, typename T>
DF_ALWAYS_INLINE void plain_max_group_body(TileRows<const T> logits, int64_t pixels, T* plain_max) {
#pragma omp simd
  for (int64_t p = 0; p < pixels; ++p) {
    T max = plain_max[p];
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r) {
      const T logit = logits.data[r * logits.stride + p];
      max = logit > max ? logit : max;
    }
    plain_max[p] = max;
  }
}

// First pass over a tile: updates the maxima in `sums`. Noisy logits into `noisy` [kTileArea], except in the
// short cut, which needs only the logits' maximum.
template <typename T>
void maxima_tile(const GumbelShape& s, const GumbelTile& t, TileRows<const T> logits, T* noisy, PixelSums<T> sums) {
  NoiseGroup noise;
  for_each_group(t.codes, [&](auto count, int64_t row) {
    constexpr int64_t kRows = decltype(count)::value;
    if (short_cut(s)) {
      simd([=, pixels = t.pixels]()
               DF_INLINE_LAMBDA { plain_max_group_body<kRows, T>(logits.from(row), pixels, sums.plain_max); });
      return;
    }
    noise.draw(s, t, row, kRows);
    simd([=, words = &noise.words[0], code = t.code + row, pixels = t.pixels]() DF_INLINE_LAMBDA {
      noisy_group_body<kRows, T>(logits.from(row), words, code, pixels, noisy + row * kTilePitch, sums);
    });
  });
}

template <int64_t kRows, typename T>
DF_ALWAYS_INLINE void exp_group_body(TileRows<const T> logits, const T* noisy, int64_t pixels, T inverse_tau,
                                     TileRows<T> y, PixelSums<T> sums) {
#pragma omp simd
  for (int64_t p = 0; p < pixels; ++p) {
    const T best = sums.best[p], plain_max = sums.plain_max[p];
    T noisy_sum = sums.noisy_sum[p], plain_sum = sums.plain_sum[p], plain_weighted = sums.plain_weighted[p];
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r) {
      const T below = logits.data[r * logits.stride + p] - plain_max;
      const T plain = vec_exp(below);
      plain_sum += plain;
      plain_weighted += plain * below;
      const T value = vec_exp((noisy[r * kTilePitch + p] - best) * inverse_tau);
      noisy_sum += value;
      y.data[r * y.stride + p] = value;
    }
    sums.noisy_sum[p] = noisy_sum;
    sums.plain_sum[p] = plain_sum;
    sums.plain_weighted[p] = plain_weighted;
  }
}

// The same for the short cut.
template <int64_t kRows, typename T>
DF_ALWAYS_INLINE void ratio_group_body(TileRows<const T> logits, const uint32_t* words, int64_t code, int64_t pixels,
                                       TileRows<T> y, PixelSums<T> sums) {
#pragma omp simd
  for (int64_t p = 0; p < pixels; ++p) {
    T best = sums.best[p];
    const T plain_max = sums.plain_max[p];
    T noisy_sum = sums.noisy_sum[p], plain_sum = sums.plain_sum[p], plain_weighted = sums.plain_weighted[p];
    int32_t best_code = sums.code[p];
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r) {
      const T below = logits.data[r * logits.stride + p] - plain_max;
      const T plain = vec_exp(below);
      plain_sum += plain;
      plain_weighted += plain * below;
      const T value = plain / static_cast<T>(exponential_from_word(words[r * kTilePixels + p]));
      best_code = value > best ? static_cast<int32_t>(code + r) : best_code;
      best = value > best ? value : best;
      noisy_sum += value;
      y.data[r * y.stride + p] = value;
    }
    sums.best[p] = best;
    sums.code[p] = best_code;
    sums.noisy_sum[p] = noisy_sum;
    sums.plain_sum[p] = plain_sum;
    sums.plain_weighted[p] = plain_weighted;
  }
}

// Second pass: y = exp((noisy - reference) / tau); adds to the sums of these and of the logits' exponentials.
template <typename T>
void exp_tile(const GumbelShape& s, const GumbelTile& t, TileRows<const T> logits, const T* noisy, TileRows<T> y,
              PixelSums<T> sums) {
  NoiseGroup noise;
  for_each_group(t.codes, [&](auto count, int64_t row) {
    constexpr int64_t kRows = decltype(count)::value;
    if (short_cut(s)) {
      noise.draw(s, t, row, kRows);
      simd([=, words = &noise.words[0], code = t.code + row, pixels = t.pixels]() DF_INLINE_LAMBDA {
        ratio_group_body<kRows, T>(logits.from(row), words, code, pixels, y.from(row), sums);
      });
      return;
    }
    simd([=, pixels = t.pixels, inverse_tau = static_cast<T>(1 / s.tau)]() DF_INLINE_LAMBDA {
      exp_group_body<kRows, T>(logits.from(row), noisy + row * kTilePitch, pixels, inverse_tau, y.from(row), sums);
    });
  });
}

// After the last tile: `best` is a noisy logit.
template <typename T>
void finish_best(const GumbelShape& s, int64_t pixels, PixelSums<T> sums) {
  if (!short_cut(s)) return;
  simd([=]() DF_INLINE_LAMBDA {
#pragma omp simd
    for (int64_t p = 0; p < pixels; ++p) sums.best[p] = sums.plain_max[p] + vec_log(sums.best[p]);
  });
}

// The statistics of a pixel, at `index` of an image's [kGumbelStats, pixels]. Sums as in PixelSums.
template <typename T>
void write_stats(const GumbelShape& s, T reference, double noisy_sum, T plain_max, double plain_sum,
                 double plain_weighted, T* stats, int64_t index) {
  const double log_plain = std::log(plain_sum), log_codes = std::log(static_cast<double>(s.codes));
  stats[kNoisyReference * s.pixels + index] = reference;
  stats[kNoisyLogSum * s.pixels + index] = static_cast<T>(std::log(noisy_sum));
  stats[kPlainLse * s.pixels + index] = static_cast<T>(plain_max + log_plain);
  stats[kPixelKl * s.pixels + index] = static_cast<T>(log_codes + plain_weighted / plain_sum - log_plain);
}

// kl [B] from the statistics.
template <typename T>
void sum_kl(const GumbelShape& s, const T* stats, T* kl) {
  for (int64_t image = 0; image < s.batch; ++image) {
    const T* pixel_kl = stats + (image * kGumbelStats + kPixelKl) * s.pixels;
    double total = 0;
    for (int64_t p = 0; p < s.pixels; ++p) total += pixel_kl[p];
    kl[image] = static_cast<T>(total);
  }
}

// Statistics of a tile's pixels for the backward, [pixels] each.
template <typename T>
struct PixelStats {
  const T *noisy_reference, *noisy_log_sum, *plain_lse, *kl;

  PixelStats(const GumbelShape& s, const GumbelTile& t, const T* stats)
      : noisy_reference(stats + (t.image * kGumbelStats + kNoisyReference) * s.pixels + t.pixel),
        noisy_log_sum(noisy_reference + (kNoisyLogSum - kNoisyReference) * s.pixels),
        plain_lse(noisy_reference + (kPlainLse - kNoisyReference) * s.pixels),
        kl(noisy_reference + (kPixelKl - kNoisyReference) * s.pixels) {}
};

// y of a group of rows from the statistics.
template <int64_t kRows, typename T>
DF_ALWAYS_INLINE void soft_group_body(TileRows<const T> logits, const uint32_t* words, int64_t pixels, T inverse_tau,
                                      PixelStats<T> stats, TileRows<T> y) {
#pragma omp simd
  for (int64_t p = 0; p < pixels; ++p) {
    const T noisy_reference = stats.noisy_reference[p], noisy_log_sum = stats.noisy_log_sum[p];
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r) {
      const T noise = static_cast<T>(gumbel_from_word(words[r * kTilePixels + p]));
      const T below = logits.data[r * logits.stride + p] + noise - noisy_reference;
      y.data[r * y.stride + p] = vec_exp(below * inverse_tau - noisy_log_sum);
    }
  }
}

// y of a tile from the statistics; its noise is drawn again.
template <typename T>
void soft_tile(const GumbelShape& s, const GumbelTile& t, TileRows<const T> logits, const T* stats, TileRows<T> y) {
  const PixelStats<T> pixel_stats(s, t, stats);
  NoiseGroup noise;
  for_each_group(t.codes, [&](auto count, int64_t row) {
    constexpr int64_t kRows = decltype(count)::value;
    noise.draw(s, t, row, kRows);
    simd([=, words = &noise.words[0], pixels = t.pixels, inverse_tau = static_cast<T>(1 / s.tau)]() DF_INLINE_LAMBDA {
      soft_group_body<kRows, T>(logits.from(row), words, pixels, inverse_tau, pixel_stats, y.from(row));
    });
  });
}

// d logits = y / tau (dy - y.dy) + dkl q (log q + log K - kl); y in `grad`, replaced by the gradient.
template <typename T>
DF_ALWAYS_INLINE void grad_row_body(const T* logits, const T* dy, const T* dot, int64_t pixels, T grad_kl, T log_codes,
                                    T inverse_tau, PixelStats<T> stats, T* grad) {
#pragma omp simd
  for (int64_t p = 0; p < pixels; ++p) {
    const T log_q = logits[p] - stats.plain_lse[p];
    const T kl_term = vec_exp(log_q) * (log_q + log_codes - stats.kl[p]);
    grad[p] = grad[p] * inverse_tau * (dy[p] - dot[p]) + grad_kl * kl_term;
  }
}

template <typename T>
void grad_tile(const GumbelShape& s, const GumbelTile& t, TileRows<const T> logits, TileRows<const T> dy, const T* dot,
               T grad_kl, const T* stats, TileRows<T> grad) {
  simd([=, codes = t.codes, pixels = t.pixels, pixel_stats = PixelStats<T>(s, t, stats),
        inverse_tau = static_cast<T>(1 / s.tau), log_codes = static_cast<T>(std::log(static_cast<double>(s.codes)))]()
           DF_INLINE_LAMBDA {
             for (int64_t c = 0; c < codes; ++c) {
               grad_row_body<T>(logits.row(c), dy.row(c), dot, pixels, grad_kl, log_codes, inverse_tau, pixel_stats,
                                grad.row(c));
             }
           });
}

}  // namespace dalle_fast::gumbel
