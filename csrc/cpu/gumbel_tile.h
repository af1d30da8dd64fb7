// What the Gumbel kernels share: tiles [codes, pixels] of the grid, read from either layout, and the two passes over
// such a tile that make noisy logits and exponentials of them. Both take kGroup codes at a time, so that what they keep
// for each pixel is loaded and stored once for all of these, while memory is read along its rows.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "gumbel.h"
#include "noise.h"
#include "simd.h"
#include "vec_math.h"

namespace dalle_fast {

constexpr int64_t kChunk = 32;          // codes
constexpr int64_t kTile = 1024;          // pixels
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

// The tile [codes, pixels] at `grid`: where it lies if its rows are contiguous, else copied to `buffer` [kArea].
template <typename T>
Rows<const T> read_tile(const T* grid, GridStrides strides, int64_t codes, int64_t pixels, T* buffer) {
  if (strides.pixel == 1) return {grid, strides.code};
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < codes; ++c) buffer[c * kPitch + p] = grid[p * strides.pixel + c];
  }
  return {buffer, kPitch};
}

// Where to write a tile: to the grid itself or to `buffer`, which write_tile then copies to the grid.
template <typename T>
Rows<T> tile_to_write(T* grid, GridStrides strides, T* buffer) {
  return strides.pixel == 1 ? Rows<T>{grid, strides.code} : Rows<T>{buffer, kPitch};
}

template <typename T>
void write_tile(Rows<T> tile, T* grid, GridStrides strides, int64_t codes, int64_t pixels) {
  if (tile.data == grid) return;
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < codes; ++c) grid[p * strides.pixel + c] = tile.data[c * kPitch + p];
  }
}

// What a chunk of codes knows of each pixel, [pixels] each.
template <typename T>
struct ChunkSums {
  T* best;            // largest noisy logit
  T* noisy_sum;       // of exp((noisy - best) / tau)
  T* plain_max;       // largest logit
  T* plain_sum;       // of exp(logit - plain_max)
  T* plain_weighted;  // of the same times (logit - plain_max)
  int32_t* code;      // of best
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
                                       T* noisy, ChunkSums<T> sums) {
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

// Noisy logits of a tile into `noisy` [kArea]; their largest, and that of the logits, into `sums`.
template <typename T>
void noisy_tile(const GumbelShape& s, const GumbelTile& t, Rows<const T> logits, T* noisy, ChunkSums<T> sums) {
  // Finite, so that a pixel whose logits are all -inf here gives zeros and not NaN.
  std::fill_n(sums.best, t.pixels, std::numeric_limits<T>::lowest());
  std::fill_n(sums.plain_max, t.pixels, std::numeric_limits<T>::lowest());
  std::fill_n(sums.code, t.pixels, static_cast<int32_t>(t.code));
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
                                     ChunkSums<T> sums) {
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

// y = exp((noisy - best) / tau); its sums, and those of the logits' exponentials.
template <typename T>
void exp_tile(const GumbelTile& t, Rows<const T> logits, const T* noisy, T inverse_tau, Rows<T> y, ChunkSums<T> sums) {
  std::fill_n(sums.noisy_sum, t.pixels, T(0));
  std::fill_n(sums.plain_sum, t.pixels, T(0));
  std::fill_n(sums.plain_weighted, t.pixels, T(0));
  for_each_group(t.codes, [&](auto count, int64_t row) {
    constexpr int64_t kRows = decltype(count)::value;
    simd([=, pixels = t.pixels]() DF_INLINE_LAMBDA {
      exp_group_body<kRows, T>(logits.from(row), noisy + row * kPitch, pixels, inverse_tau, y.from(row), sums);
    });
  });
}

}  // namespace dalle_fast
