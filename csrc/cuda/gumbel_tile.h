// What the kernels of the product with the codebook share: tiles of 64 codes by 64 pixels, and rows of the codebook and
// of z by a block's channels.
#pragma once

#include "cuda/gumbel_quad.h"

namespace dalle_fast {

constexpr int kTileThreads = 256;
constexpr int kTileCodes = 64;
constexpr int kTilePixels = 64;
constexpr int kTileQuads = kTilePixels / kQuad;
constexpr int kTileSlices = kTileThreads / kTileQuads;  // threads that share the codes of a quad
constexpr int kOwnCodes = kTileCodes / kTileSlices;     // of a thread
constexpr int kCodePitch = kTilePixels + kQuad;         // elements from a code's pixels to the next, against conflicts
constexpr int kOwnRows = kTilePixels * kWarp / kTileThreads;  // of a warp, in a product of a tile with channels

template <typename T>
constexpr int kTileChannels = sizeof(T) == 4 ? 128 : 64;
template <typename S>
constexpr int kTileBlocks = sizeof(S) == 8 ? 1 : 2;  // on a multiprocessor

// Channels of a thread, side by side.
template <typename T>
struct alignas(16) OwnChannels {
  static constexpr int kCount = kTileChannels<T> / kWarp;
  T at[kCount];
};

// Where a thread works in a tile: neighbouring lanes read neighbouring memory.
struct TilePlace {
  int quad, slice;  // codes slice, slice + kTileSlices, ...

  DF_DEVICE explicit TilePlace(GridStrides strides) {
    const int near = threadIdx.x % kTileQuads, far = threadIdx.x / kTileQuads;
    static_assert(kTileQuads == kTileSlices);
    quad = strides.pixel == 1 ? near : far;
    slice = strides.pixel == 1 ? far : near;
  }
};

inline __host__ __device__ int64_t tiles_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

}  // namespace dalle_fast
