// What the Gumbel kernels share: tiles [codes, pixels] of the grid, read from either layout, and the two passes over
// such a tile that make noisy logits and exponentials of them. Both take kGroup codes at a time, so that what they keep
// for each pixel is loaded and stored once for all of these, while memory is read along its rows.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

#include "convert.h"
#include "gumbel.h"
#include "noise.h"
#include "simd.h"
#include "vec_math.h"

namespace dalle_fast {

constexpr int64_t kChunk = 48;          // codes
constexpr int64_t kTile = 1024;         // pixels
constexpr int64_t kPitch = kTile + 16;  // elements from a tile's row to the next: an odd number of cache lines
constexpr int64_t kArea = kChunk * kPitch;
constexpr int64_t kGroup = 4;

struct GumbelTile {
  int64_t image, chunk, code, codes, pixel, pixels;  // its first code and pixel, and how many

  int64_t offset(const GumbelShape& s, GridStrides strides) const {
    return image * s.codes * s.pixels + code * strides.code + pixel * strides.pixel;
  }
};

inline int64_t chunk_count(const GumbelShape& s) { return (s.codes + kChunk - 1) / kChunk; }

template <typename Body>
void for_each_tile_of_chunk(const GumbelShape& s, int64_t image, int64_t chunk, const Body& body) {
  const int64_t code = chunk * kChunk, codes = std::min(kChunk, s.codes - code);
  for (int64_t pixel = 0; pixel < s.pixels; pixel += kTile) {
    body(GumbelTile{image, chunk, code, codes, pixel, std::min(kTile, s.pixels - pixel)});
  }
}

// Calls body(tile) for every tile; a chunk's tiles run on one thread.
template <typename Body>
void for_each_tile(const GumbelShape& s, const Body& body) {
  const int64_t chunks = chunk_count(s);
  torch::stable::parallel_for(0, s.batch * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) for_each_tile_of_chunk(s, i / chunks, i % chunks, body);
  });
}

// The same from each thread's last chunk to its first: those that it wrote last may still be in the cache.
template <typename Body>
void for_each_tile_backwards(const GumbelShape& s, const Body& body) {
  const int64_t chunks = chunk_count(s);
  torch::stable::parallel_for(0, s.batch * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = end; i-- > begin;) for_each_tile_of_chunk(s, i / chunks, i % chunks, body);
  });
}

// Rows of a tile, in the grid itself or in a buffer.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;  // in elements

  T* row(int64_t code) const { return data + code * stride; }
  Rows from(int64_t code) const { return {row(code), stride}; }
};

template <typename S>
DF_ALWAYS_INLINE Arithmetic<S> widen(S x) {
  if constexpr (std::is_same_v<S, uint16_t>)
    return load_bfloat16(x);
  else
    return x;
}

template <typename S>
DF_ALWAYS_INLINE S narrow(Arithmetic<S> x) {
  if constexpr (std::is_same_v<S, uint16_t>)
    return store_bfloat16(x);
  else
    return x;
}

// Fetches the codes of one pixel ahead in channels_last memory. Pixels lie far apart there, which no hardware foresees,
// often by a power of two, of which the cache holds few: so not far ahead.
template <typename S>
DF_ALWAYS_INLINE void prefetch_codes(const S* pixel, int64_t codes) {
  for (int64_t c = 0; c < codes; c += 64 / sizeof(S)) __builtin_prefetch(pixel + c);
}

constexpr int64_t kAhead = 6;  // pixels

// Whether kernels work on the rows of a grid where they lie.
template <typename S>
bool in_place(GridStrides strides) {
  return std::is_same_v<S, Arithmetic<S>> && strides.pixel == 1;
}

// The tile [codes, pixels] at `grid`: where it lies, or copied to `buffer` [kArea].
template <typename S, typename T = Arithmetic<S>>
Rows<const T> read_tile(const S* grid, GridStrides strides, int64_t codes, int64_t pixels, T* buffer) {
  if constexpr (std::is_same_v<S, T>) {
    if (in_place<S>(strides)) return {grid, strides.code};
  }
  simd([=]() DF_INLINE_LAMBDA {
    if (strides.pixel == 1) {
      for (int64_t c = 0; c < codes; ++c) {
#pragma omp simd
        for (int64_t p = 0; p < pixels; ++p) buffer[c * kPitch + p] = widen<S>(grid[c * strides.code + p]);
      }
    } else {
      for (int64_t p = 0; p < pixels; ++p) {
        const S* row = grid + p * strides.pixel;
        if (p + kAhead < pixels) prefetch_codes(row + kAhead * strides.pixel, codes);
        for (int64_t c = 0; c < codes; ++c) buffer[c * kPitch + p] = widen<S>(row[c]);
      }
    }
  });
  return {buffer, kPitch};
}

// Where to write a tile: to the grid itself or to `buffer`, which write_tile then copies to the grid.
template <typename S, typename T = Arithmetic<S>>
Rows<T> tile_to_write(S* grid, GridStrides strides, T* buffer) {
  if constexpr (std::is_same_v<S, T>) {
    if (in_place<S>(strides)) return {grid, strides.code};
  }
  return {buffer, kPitch};
}

template <typename S, typename T = Arithmetic<S>>
void write_tile(Rows<T> tile, S* grid, GridStrides strides, int64_t codes, int64_t pixels) {
  if (in_place<S>(strides)) return;
  simd([=]() DF_INLINE_LAMBDA {
    if (strides.pixel == 1) {
      for (int64_t c = 0; c < codes; ++c) {
#pragma omp simd
        for (int64_t p = 0; p < pixels; ++p) grid[c * strides.code + p] = narrow<S>(tile.data[c * kPitch + p]);
      }
    } else {
      for (int64_t p = 0; p < pixels; ++p) {
        S* row = grid + p * strides.pixel;
        if (p + kAhead < pixels) prefetch_codes(row + kAhead * strides.pixel, codes);
        for (int64_t c = 0; c < codes; ++c) row[c] = narrow<S>(tile.data[c * kPitch + p]);
      }
    }
  });
}

// What is known of each pixel after some of the codes, [pixels] each.
template <typename T>
struct PixelSums {
  T* best;            // largest noisy logit
  T* noisy_sum;       // of exp((noisy - best) / tau)
  T* plain_max;       // largest logit
  T* plain_sum;       // of exp(logit - plain_max)
  T* plain_weighted;  // of the same times (logit - plain_max)
  int32_t* code;      // of best

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

// Calls body(Count{}, first row) for groups of kGroup rows and for those that remain, one by one; Count is a
// std::integral_constant.
template <typename Body>
void for_each_group(int64_t rows, const Body& body) {
  int64_t row = 0;
  for (; row + kGroup <= rows; row += kGroup) body(std::integral_constant<int64_t, kGroup>{}, row);
  for (; row < rows; ++row) body(std::integral_constant<int64_t, 1>{}, row);
}

// A group of noise, as random words.
struct NoiseGroup {
  alignas(64) uint32_t words[kGroup * kTile];

  void draw(const GumbelShape& s, const GumbelTile& t, int64_t row, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t first = (t.image * s.codes + t.code + row + r) * s.pixels + t.pixel;
      random_words(s.seed, first, t.pixels, words + r * kTile);
    }
  }
};

template <int64_t kRows, typename T>
DF_ALWAYS_INLINE void noisy_group_body(Rows<const T> logits, const uint32_t* words, int64_t code, int64_t pixels,
                                       T* noisy, PixelSums<T> sums) {
#pragma omp simd
  for (int64_t p = 0; p < pixels; ++p) {
    T best = sums.best[p], plain_max = sums.plain_max[p];
    int32_t best_code = sums.code[p];
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r) {
      const T logit = logits.data[r * logits.stride + p];
      const T value = logit + static_cast<T>(gumbel_from_word(words[r * kTile + p]));
      noisy[r * kPitch + p] = value;
      best_code = value > best ? static_cast<int32_t>(code + r) : best_code;
      best = value > best ? value : best;
      plain_max = logit > plain_max ? logit : plain_max;
    }
    sums.best[p] = best;
    sums.plain_max[p] = plain_max;
    sums.code[p] = best_code;
  }
}

// Noisy logits of a tile into `noisy` [kArea]; the maxima in `sums` grow by theirs.
template <typename T>
void noisy_tile(const GumbelShape& s, const GumbelTile& t, Rows<const T> logits, T* noisy, PixelSums<T> sums) {
  NoiseGroup noise;
  for_each_group(t.codes, [&](auto count, int64_t row) {
    constexpr int64_t kRows = decltype(count)::value;
    noise.draw(s, t, row, kRows);
    simd([=, words = &noise.words[0], code = t.code + row, pixels = t.pixels]() DF_INLINE_LAMBDA {
      noisy_group_body<kRows, T>(logits.from(row), words, code, pixels, noisy + row * kPitch, sums);
    });
  });
}

template <int64_t kRows, typename T>
DF_ALWAYS_INLINE void exp_group_body(Rows<const T> logits, const T* noisy, int64_t pixels, T inverse_tau, Rows<T> y,
                                     PixelSums<T> sums) {
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
      const T value = vec_exp((noisy[r * kPitch + p] - best) * inverse_tau);
      noisy_sum += value;
      y.data[r * y.stride + p] = value;
    }
    sums.noisy_sum[p] = noisy_sum;
    sums.plain_sum[p] = plain_sum;
    sums.plain_weighted[p] = plain_weighted;
  }
}

// y = exp((noisy - best) / tau); adds to the sums of these and of the logits' exponentials.
template <typename T>
void exp_tile(const GumbelTile& t, Rows<const T> logits, const T* noisy, T inverse_tau, Rows<T> y, PixelSums<T> sums) {
  for_each_group(t.codes, [&](auto count, int64_t row) {
    constexpr int64_t kRows = decltype(count)::value;
    simd([=, pixels = t.pixels]() DF_INLINE_LAMBDA {
      exp_group_body<kRows, T>(logits.from(row), noisy + row * kPitch, pixels, inverse_tau, y.from(row), sums);
    });
  });
}

// The statistics of a pixel, at `index` of an image's [kGumbelStats, pixels]. Sums as in PixelSums.
template <typename T>
void write_stats(const GumbelShape& s, T best, double noisy_sum, T plain_max, double plain_sum, double plain_weighted,
                 T* stats, int64_t index) {
  const double log_plain = std::log(plain_sum), log_codes = std::log(static_cast<double>(s.codes));
  stats[kNoisyMax * s.pixels + index] = best;
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

// What the backward knows of a tile's pixels, [pixels] each.
template <typename T>
struct PixelStats {
  const T *noisy_max, *noisy_log_sum, *plain_lse, *kl;

  PixelStats(const GumbelShape& s, const GumbelTile& t, const T* stats)
      : noisy_max(stats + (t.image * kGumbelStats + kNoisyMax) * s.pixels + t.pixel),
        noisy_log_sum(noisy_max + (kNoisyLogSum - kNoisyMax) * s.pixels),
        plain_lse(noisy_max + (kPlainLse - kNoisyMax) * s.pixels),
        kl(noisy_max + (kPixelKl - kNoisyMax) * s.pixels) {}
};

// y of a group of rows from the statistics.
template <int64_t kRows, typename T>
DF_ALWAYS_INLINE void soft_group_body(Rows<const T> logits, const uint32_t* words, int64_t pixels, T inverse_tau,
                                      PixelStats<T> stats, Rows<T> y) {
#pragma omp simd
  for (int64_t p = 0; p < pixels; ++p) {
    const T noisy_max = stats.noisy_max[p], noisy_log_sum = stats.noisy_log_sum[p];
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r) {
      const T noise = static_cast<T>(gumbel_from_word(words[r * kTile + p]));
      const T below = logits.data[r * logits.stride + p] + noise - noisy_max;
      y.data[r * y.stride + p] = vec_exp(below * inverse_tau - noisy_log_sum);
    }
  }
}

// y of a tile from the statistics; its noise is drawn again.
template <typename T>
void soft_tile(const GumbelShape& s, const GumbelTile& t, Rows<const T> logits, const T* stats, Rows<T> y) {
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
void grad_tile(const GumbelShape& s, const GumbelTile& t, Rows<const T> logits, Rows<const T> dy, const T* dot,
               T grad_kl, const T* stats, Rows<T> grad) {
  simd([=, codes = t.codes, pixels = t.pixels, pixel_stats = PixelStats<T>(s, t, stats),
        inverse_tau = static_cast<T>(1 / s.tau), log_codes = static_cast<T>(std::log(static_cast<double>(s.codes)))]()
           DF_INLINE_LAMBDA {
             for (int64_t c = 0; c < codes; ++c) {
               grad_row_body<T>(logits.row(c), dy.row(c), dot, pixels, grad_kl, log_codes, inverse_tau, pixel_stats,
                                grad.row(c));
             }
           });
}

}  // namespace dalle_fast
