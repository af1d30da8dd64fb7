// The gradients of k and v on tensor cores. A block of threads owns 64 keys of a head and meets the queries that see
// them, 32 at a time, with everything transposed: a row of weights belongs to a key. Both gradients stay in registers;
// so do keys and values, unless they have 128 channels: then shared memory keeps them.
//
// A key of the text meets all later text and the whole image, twenty times as many queries as a key of the image: the
// text tiles of all heads come first.
#include "attention/cuda_sparse_attention.h"
#include "attention/cuda_tile.h"

namespace dalle_fast::attention {
namespace {

template <int kChannels>
constexpr int kResidentBlocks = kChannels == 128  ? 2
                                : kChannels == 64 ? 3
                                                  : 4;  // of a multiprocessor, at once

DF_DEVICE TokenTile key_tile(const AttentionShape& shape, int block) {
  const Grid& grid = shape.grid;
  const int text_tiles = token_tiles(grid.text_len), image_tiles = token_tiles(grid.image_len());
  const int text_blocks = shape.batch * shape.heads * text_tiles;
  if (block < text_blocks) return tile_of(grid, block / text_tiles, block % text_tiles, true);
  return tile_of(grid, (block - text_blocks) / image_tiles, (block - text_blocks) % image_tiles, false);
}

template <typename T, int kChannels>
struct SharedMemory {
  using R = TileRing<T, kChannels>;
  static constexpr bool kKeeps = kChannels == 128;  // keys and values stay
  static constexpr int kOwn = kKeeps ? kRingSlots : 0;
  static constexpr size_t kStats = (kKeeps ? kRingSlots + 2 : kRingSlots) * R::kTileBytes;
  static constexpr size_t kBytes = kStats + kRingSlots * 2 * kBlockTokens * sizeof(float);

  unsigned char* data;

  DF_DEVICE R ring() const { return {reinterpret_cast<T*>(data)}; }
  DF_DEVICE typename R::Rows keys() const { return ring().tile(kOwn); }  // where they are loaded, and may stay
  DF_DEVICE typename R::Rows values() const { return ring().tile(kOwn + 1); }
  // Log-sum-exp and delta of the queries of a block.
  DF_DEVICE float* stats(int slot) const { return reinterpret_cast<float*>(data + kStats) + slot * 2 * kBlockTokens; }
};

template <typename T, int kChannels>
__global__ void __launch_bounds__(kTileThreads, kResidentBlocks<kChannels>) dkv_kernel(SparseAttentionBackward p) {
  DF_SHARED(bytes);
  const SharedMemory<T, kChannels> shared{bytes};
  const TileRing<T, kChannels> ring = shared.ring();

  const AttentionShape& shape = p.shape;
  const StreamMask mask{shape.kind, shape.grid};
  const TokenTile tile = key_tile(shape, blockIdx.x);
  const TokenRows<const T> q(p.q, shape, tile.head), dout(p.dout, shape, tile.head);

  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * kStripTokens, first = tile.first + row;
  const bool idle = first >= tile.end;
  const TokenRows<const T> k(p.k, shape, tile.head), v(p.v, shape, tile.head);
  shared.keys().template load<kTileTokens>(k, mask, tile.first, tile.end);
  shared.values().template load<kTileTokens>(v, mask, tile.first, tile.end);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  uint32_t keys[kChannels / 16][4], values[kChannels / 16][4];
  shared.keys().strip(row, keys);
  shared.values().strip(row, values);
  __syncthreads();

  const int64_t rows = int64_t{tile.head} * mask.grid.seq_len();
  VisibleBlocks<false> blocks(mask, tile);
  const auto load = [&](int slot) {
    const int block = blocks.next(), end = blocks.end(block);
    if (block >= 0) {
      ring.load(slot, q, dout, mask, block, end);
      if (threadIdx.x < 2 * kBlockTokens) {
        const int query = block + threadIdx.x % kBlockTokens;
        const bool inside = query < end;
        const float* from = static_cast<const float*>(threadIdx.x < kBlockTokens ? p.lse : p.delta) + rows;
        copy_async<4>(shared.stats(slot) + threadIdx.x, from + (inside ? mask.token(query) : 0), inside);
      }
    }
    return block;
  };
  RingPipeline pipeline(load);

  const float to_log2 = static_cast<float>(shape.scale) * kLog2E;
  float dk[kChannels / 8][4] = {}, dv[kChannels / 8][4] = {};
  pipeline.run([&](int block, int slot) {
    if (idle) return;
    const int query = block + lane;
    const StripMask strip = StripMask::of_keys(query < blocks.end(block) ? mask.keep(query, first) : 0);
    if (!strip.any) return;

    const float *lse = shared.stats(slot), *delta = lse + kBlockTokens;
    float weights[kBlockTokens / 8][4], dscores[kBlockTokens / 8][4];
    if (shared.kKeeps) {
      ring.first(slot).score(shared.keys(), row, weights);
    } else {
      ring.first(slot).score(keys, weights);
    }
    for (int n = 0; n < kBlockTokens / 8; ++n) {
      for (int i = 0; i < 4; ++i) {
        weights[n][i] = exp2_approximate(weights[n][i] * to_log2 - lse[StripMask::column_of(n, i)] * kLog2E);
      }
    }
    strip.hide(weights, 0.0f);
    ring.second(slot).weigh(weights, dv);

    if (shared.kKeeps) {
      ring.second(slot).score(shared.values(), row, dscores);
    } else {
      ring.second(slot).score(values, dscores);
    }
    for (int n = 0; n < kBlockTokens / 8; ++n) {
      for (int i = 0; i < 4; ++i) dscores[n][i] = weights[n][i] * (dscores[n][i] - delta[StripMask::column_of(n, i)]);
    }
    ring.first(slot).weigh(dscores, dk);
  });

  if (idle) return;
  // The first slots now hold the results, a strip for each warp.
  const float scale = static_cast<float>(shape.scale);
  ring.tile(0).store(row, dk, {scale, scale}, TokenRows<T>(p.dk, shape, tile.head), mask, first, tile.end);
  ring.tile(1).store(row, dv, {1.0f, 1.0f}, TokenRows<T>(p.dv, shape, tile.head), mask, first, tile.end);
}

}  // namespace

cudaError_t launch_tile_dkv(const SparseAttentionBackward& params, cudaStream_t stream) {
  return with_tile_kernel(params.shape, [&](auto element, auto channels) {
    using T = decltype(element);
    constexpr int kChannels = decltype(channels)::value;
    return launch(dkv_kernel<T, kChannels>, query_tiles(params.shape), kTileThreads, SharedMemory<T, kChannels>::kBytes,
                  stream, params);
  });
}

}  // namespace dalle_fast::attention
