// The forward on tensor cores. A block of threads owns 64 queries of a head and meets their keys and values, 32 at a
// time, in one pass with an online softmax. Queries, scores and the output stay in registers.
#include "attention/cuda_sparse_attention.h"
#include "attention/cuda_tile.h"

namespace dalle_fast::attention {
namespace {

template <int kChannels>
constexpr int kResidentBlocks = kChannels == 128  ? 2
                                : kChannels == 64 ? 4
                                                  : 5;  // of a multiprocessor, at once

template <typename T, int kChannels>
__global__ void __launch_bounds__(kTileThreads, kResidentBlocks<kChannels>) forward_kernel(SparseAttentionForward p) {
  DF_SHARED(shared);
  const TileRing<T, kChannels> ring{reinterpret_cast<T*>(shared)};

  const AttentionShape& shape = p.shape;
  const StreamMask mask{shape.kind, shape.grid};
  const TokenTile tile = query_tile(mask.grid, blockIdx.x);
  const TokenRows<const T> q(p.q, shape, tile.head), k(p.k, shape, tile.head), v(p.v, shape, tile.head);

  VisibleBlocks<true> blocks(mask, tile);
  const auto load = [&](int slot) {
    const int block = blocks.next();
    if (block >= 0) ring.load(slot, k, v, mask, block, blocks.end(block));
    return block;
  };

  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * kStripTokens, first = tile.first + row;
  const bool idle = first >= tile.end;
  // The queries pass through the slot that is needed last.
  ring.tile(kRingSlots - 1).template load<kTileTokens>(q, mask, tile.first, tile.end);
  RingPipeline pipeline(load);
  wait_copies<kRingSlots - 2>();
  __syncthreads();
  uint32_t queries[kChannels / 16][4];
  ring.tile(kRingSlots - 1).strip(row, queries);

  const float to_log2 = static_cast<float>(shape.scale) * kLog2E;
  float out[kChannels / 8][4] = {};
  StripSoftmax softmax;
  pipeline.run([&](int block, int slot) {
    if (idle) return;
    const int query = min(first + lane % kStripTokens, tile.end - 1);
    const StripMask strip = StripMask::of_queries(mask.keep(query, block));
    if (!strip.any) return;

    float scores[kBlockTokens / 8][4];
    ring.first(slot).score(queries, scores);
    for (auto& x : scores) {
      for (float& score : x) score *= to_log2;
    }
    strip.hide(scores, -INFINITY);
    softmax.add(scores, out);
    ring.second(slot).weigh(scores, out);
  });

  if (idle) return;
  // The first slot now holds the output, a strip for each warp.
  softmax.finish();
  float inverse[2];
  for (int i = 0; i < 2; ++i) {
    inverse[i] = 1.0f / softmax.sum[i];
    const int query = first + lane / 4 + 8 * i;
    if (lane % 4 == 0 && query < tile.end) {
      float* lse = static_cast<float*>(p.lse) + int64_t{tile.head} * mask.grid.seq_len();
      lse[mask.token(query)] = softmax.maximum[i] * kLn2 + logf(softmax.sum[i]);
    }
  }
  ring.tile(0).store(row, out, inverse, TokenRows<T>(p.out, shape, tile.head), mask, first, tile.end);
}

}  // namespace

cudaError_t launch_tile_forward(const SparseAttentionForward& params, cudaStream_t stream) {
  return with_tile_kernel(params.shape, [&](auto element, auto channels) {
    using T = decltype(element);
    constexpr int kChannels = decltype(channels)::value;
    return launch(forward_kernel<T, kChannels>, query_tiles(params.shape), kTileThreads, TileRing<T, kChannels>::kBytes,
                  stream, params);
  });
}

}  // namespace dalle_fast::attention
