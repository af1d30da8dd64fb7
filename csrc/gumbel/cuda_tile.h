// Tiles of 64 codes by 64 pixels, with some channels of the codebook and of z: for the kernels of gumbel_quantize,
// which multiply with the codebook.
#pragma once

#include "gumbel/cuda_quad.h"

namespace dalle_fast::gumbel {

constexpr int kProductThreads = 256;
constexpr int kTileCodes = 64;
constexpr int kTilePixels = 64;
constexpr int kTileQuads = kTilePixels / kQuad;
constexpr int kTileSlices = kProductThreads / kTileQuads;  // threads that share the codes of a quad
constexpr int kThreadCodes = kTileCodes / kTileSlices;     // of a thread
constexpr int kCodePitch = kTilePixels + kQuad;            // from a code's pixels to the next, against bank conflicts
constexpr int kWarpRows = kTilePixels * kWarp / kProductThreads;  // of a warp, in a product with channels
template <typename S>
constexpr int kProductBlocks = sizeof(S) == 8 ? 1 : 2;  // on a multiprocessor

inline __host__ __device__ int64_t tiles_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

DF_DEVICE int lane_index() { return threadIdx.x % kWarp; }
// The first of a warp's kWarpRows.
DF_DEVICE int first_row_of_warp() { return threadIdx.x / kWarp * kWarpRows; }

// Place of a thread in a tile: neighbouring lanes read neighbouring memory.
struct TilePlace {
  int quad, slice;  // codes slice, slice + kTileSlices, ...

  DF_DEVICE explicit TilePlace(GridStrides strides) {
    static_assert(kTileQuads == kTileSlices);
    const int near = threadIdx.x % kTileQuads, far = threadIdx.x / kTileQuads;
    quad = strides.pixel == 1 ? near : far;
    slice = strides.pixel == 1 ? far : near;
  }
};

// Channels side by side.
template <typename T, int count>
struct alignas(16) ChannelVector {
  T at[count];
};

// body(row, channel, x) for rows of the codebook from first_code on, 0 beyond the last code or channel.
template <int block_channels, typename S, typename Body>
DF_DEVICE void for_each_codebook_element(const S* codebook, int codes, int64_t channels, int first_code,
                                         int64_t first_channel, const Body& body) {
  static_assert(kProductThreads % block_channels == 0);
  const int channel = threadIdx.x % block_channels;
  const S* const from = codebook + first_code * channels + first_channel + channel;
  for (int row = threadIdx.x / block_channels; row < kTileCodes; row += kProductThreads / block_channels) {
    const bool inside = first_code + row < codes && first_channel + channel < channels;
    body(row, channel, inside ? from[row * channels] : S{});
  }
}

}  // namespace dalle_fast::gumbel
