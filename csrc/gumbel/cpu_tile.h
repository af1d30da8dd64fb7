// Tiles [codes, pixels] of the grid, from and to either layout, for all Gumbel kernels. Passes over a tile take
// kGroupCodes codes at a time: memory is read along its rows, and the sums of each pixel are loaded and stored once per
// group.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>

#include "common/format.h"
#include "cpu/noise.h"
#include "cpu/simd.h"
#include "gumbel/gumbel.h"

namespace dalle_fast::gumbel {

constexpr int64_t kChunkCodes = 48;
constexpr int64_t kTilePixels = 1024;
// Elements from a row of a tile to the next: an odd number of cache lines.
constexpr int64_t kTilePitch = kTilePixels + 16;
constexpr int64_t kTileArea = kChunkCodes * kTilePitch;
constexpr int64_t kGroupCodes = 4;

struct GumbelTile {
  int64_t image, chunk, code, codes, pixel, pixels;  // `code` and `pixel` are the first

  int64_t offset(const GumbelShape& s, GridStrides strides) const {
    return image * s.codes * s.pixels + code * strides.code + pixel * strides.pixel;
  }
};

inline int64_t chunk_count(const GumbelShape& s) { return (s.codes + kChunkCodes - 1) / kChunkCodes; }

// Calls body(tile) for an image's tiles of a chunk, of up to `most` pixels each.
template <typename Body>
void for_each_tile_of_chunk(const GumbelShape& s, int64_t image, int64_t chunk, int64_t most, const Body& body) {
  const int64_t code = chunk * kChunkCodes, codes = std::min(kChunkCodes, s.codes - code);
  for (int64_t pixel = 0; pixel < s.pixels; pixel += most) {
    body(GumbelTile{image, chunk, code, codes, pixel, std::min(most, s.pixels - pixel)});
  }
}

// Calls body(tile) for every tile; a chunk's tiles run on one thread.
template <typename Body>
void for_each_tile(const GumbelShape& s, const Body& body) {
  const int64_t chunks = chunk_count(s);
  torch::stable::parallel_for(0, s.batch * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) for_each_tile_of_chunk(s, i / chunks, i % chunks, kTilePixels, body);
  });
}

// The same from each thread's last chunk to its first: those that it wrote last may still be in the cache.
template <typename Body>
void for_each_tile_backwards(const GumbelShape& s, const Body& body) {
  const int64_t chunks = chunk_count(s);
  torch::stable::parallel_for(0, s.batch * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = end; i-- > begin;) for_each_tile_of_chunk(s, i / chunks, i % chunks, kTilePixels, body);
  });
}

// Rows of a tile, in the grid itself or in a buffer.
template <typename T>
struct TileRows {
  T* data;
  int64_t stride;  // in elements

  T* row(int64_t code) const { return data + code * stride; }
  TileRows from(int64_t code) const { return {row(code), stride}; }
};

// Prefetches the codes of one pixel in channels_last memory, where pixels lie too far apart for the hardware to
// foresee. The distance is often a power of two, of which the cache holds few: so not far ahead.
template <typename S>
DF_ALWAYS_INLINE void prefetch_codes(const S* pixel, int64_t codes) {
  for (int64_t c = 0; c < codes; c += 64 / sizeof(S)) __builtin_prefetch(pixel + c);
}

constexpr int64_t kPixelsAhead = 6;

// True if kernels work on the rows of a grid in place.
template <typename S>
bool in_place(GridStrides strides) {
  return std::is_same_v<S, Arithmetic<S>> && strides.pixel == 1;
}

// The tile [codes, pixels] at `grid`: where it lies, or copied to `buffer` [kTileArea].
template <typename S, typename T = Arithmetic<S>>
TileRows<const T> read_tile(const S* grid, GridStrides strides, int64_t codes, int64_t pixels, T* buffer) {
  if constexpr (std::is_same_v<S, T>) {
    if (in_place<S>(strides)) return {grid, strides.code};
  }
  simd([=]() DF_INLINE_LAMBDA {
    if (strides.pixel == 1) {
      for (int64_t c = 0; c < codes; ++c) {
#pragma omp simd
        for (int64_t p = 0; p < pixels; ++p) buffer[c * kTilePitch + p] = widen(grid[c * strides.code + p]);
      }
    } else {
      for (int64_t p = 0; p < pixels; ++p) {
        const S* row = grid + p * strides.pixel;
        if (p + kPixelsAhead < pixels) prefetch_codes(row + kPixelsAhead * strides.pixel, codes);
        for (int64_t c = 0; c < codes; ++c) buffer[c * kTilePitch + p] = widen(row[c]);
      }
    }
  });
  return {buffer, kTilePitch};
}

// Where to write a tile: to the grid itself or to `buffer`, which write_tile then copies to the grid.
template <typename S, typename T = Arithmetic<S>>
TileRows<T> tile_to_write(S* grid, GridStrides strides, T* buffer) {
  if constexpr (std::is_same_v<S, T>) {
    if (in_place<S>(strides)) return {grid, strides.code};
  }
  return {buffer, kTilePitch};
}

template <typename S, typename T = Arithmetic<S>>
void write_tile(TileRows<T> tile, S* grid, GridStrides strides, int64_t codes, int64_t pixels) {
  if (in_place<S>(strides)) return;
  simd([=]() DF_INLINE_LAMBDA {
    if (strides.pixel == 1) {
      for (int64_t c = 0; c < codes; ++c) {
#pragma omp simd
        for (int64_t p = 0; p < pixels; ++p) grid[c * strides.code + p] = narrow<S>(tile.data[c * kTilePitch + p]);
      }
    } else {
      for (int64_t p = 0; p < pixels; ++p) {
        S* row = grid + p * strides.pixel;
        if (p + kPixelsAhead < pixels) prefetch_codes(row + kPixelsAhead * strides.pixel, codes);
        for (int64_t c = 0; c < codes; ++c) row[c] = narrow<S>(tile.data[c * kTilePitch + p]);
      }
    }
  });
}

// Calls body(Count{}, first row) for groups of kGroupCodes rows and for those that remain, one by one; Count is a
// std::integral_constant.
template <typename Body>
void for_each_group(int64_t rows, const Body& body) {
  int64_t row = 0;
  for (; row + kGroupCodes <= rows; row += kGroupCodes) body(std::integral_constant<int64_t, kGroupCodes>{}, row);
  for (; row < rows; ++row) body(std::integral_constant<int64_t, 1>{}, row);
}

// The noise of a group of codes, as random words.
struct NoiseGroup {
  alignas(64) uint32_t words[kGroupCodes * kTilePixels];

  void draw(const GumbelShape& s, const GumbelTile& t, int64_t row, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t first = (t.image * s.codes + t.code + row + r) * s.pixels + t.pixel;
      random_words(static_cast<uint64_t>(*s.seed), first, t.pixels, words + r * kTilePixels);
    }
  }
};

}  // namespace dalle_fast::gumbel
