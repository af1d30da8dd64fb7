// The gradient of q on tensor cores. A block of threads owns 64 queries of a head, computes the weights of their keys
// again from the log-sum-exp, 32 keys at a time, and keeps the gradient in registers. It also writes delta, the sum of
// dout out, for the next kernel (sparse_attention_dkv_cuda.cu).
#include "attention/cuda_sparse_attention.h"
#include "attention/cuda_tile.h"

namespace dalle_fast::attention {
namespace {

template <int kChannels>
constexpr int kResidentBlocks = kChannels == 128  ? 2
                                : kChannels == 64 ? 3
                                                  : 4;  // of a multiprocessor, at once

// Sums of the products of two strips, row by row.
template <typename T, int kSteps>
DF_DEVICE void dot_rows(const uint32_t (&a)[kSteps][4], const uint32_t (&b)[kSteps][4], float (&sum)[2]) {
  sum[0] = sum[1] = 0;
  for (int d = 0; d < kSteps; ++d) {
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack<T>(a[d][i]), y = unpack<T>(b[d][i]);
      sum[i % 2] += x.x * y.x + x.y * y.y;
    }
  }
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    for (float& x : sum) x += __shfl_xor_sync(kAllLanes, x, lanes);
  }
}

template <typename T, int kChannels>
__global__ void __launch_bounds__(kTileThreads, kResidentBlocks<kChannels>) dq_kernel(SparseAttentionBackward p) {
  DF_SHARED(shared);
  const TileRing<T, kChannels> ring{reinterpret_cast<T*>(shared)};

  const AttentionShape& shape = p.shape;
  const StreamMask mask{shape.kind, shape.grid};
  const TokenTile tile = query_tile(mask.grid, blockIdx.x);
  const TokenRows<const T> k(p.k, shape, tile.head), v(p.v, shape, tile.head);

  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * kStripTokens, first = tile.first + row;
  const bool idle = first >= tile.end;
  const View own[kRingSlots] = {p.q, p.dout, p.out};
  for (int i = 0; i < kRingSlots; ++i) {
    ring.tile(i).template load<kTileTokens>(TokenRows<const T>(own[i], shape, tile.head), mask, tile.first, tile.end);
  }
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  uint32_t queries[kChannels / 16][4], dout[kChannels / 16][4];
  float delta[2], lse[2] = {};
  ring.tile(0).strip(row, queries);
  ring.tile(1).strip(row, dout);
  {
    uint32_t out[kChannels / 16][4];
    ring.tile(2).strip(row, out);
    dot_rows<T>(dout, out, delta);
  }
  const int64_t rows = int64_t{tile.head} * mask.grid.seq_len();
  for (int i = 0; i < 2; ++i) {
    const int query = first + lane / 4 + 8 * i;
    if (query >= tile.end) continue;
    const int64_t at = rows + mask.token(query);
    lse[i] = static_cast<const float*>(p.lse)[at] * kLog2E;
    if (lane % 4 == 0) static_cast<float*>(p.delta)[at] = delta[i];
  }
  __syncthreads();

  VisibleBlocks<true> blocks(mask, tile);
  const auto load = [&](int slot) {
    const int block = blocks.next();
    if (block >= 0) ring.load(slot, k, v, mask, block, blocks.end(block));
    return block;
  };
  RingPipeline pipeline(load);

  const float to_log2 = static_cast<float>(shape.scale) * kLog2E;
  float dq[kChannels / 8][4] = {};
  pipeline.run([&](int block, int slot) {
    if (idle) return;
    const int query = min(first + lane % kStripTokens, tile.end - 1);
    const StripMask strip = StripMask::of_queries(mask.keep(query, block));
    if (!strip.any) return;

    float weights[kBlockTokens / 8][4], dscores[kBlockTokens / 8][4];
    ring.first(slot).score(queries, weights);
    ring.second(slot).score(dout, dscores);
    for (auto& x : weights) {
      for (int i = 0; i < 4; ++i) x[i] = exp2_approximate(x[i] * to_log2 - lse[i / 2]);
    }
    strip.hide(weights, 0.0f);
    for (int n = 0; n < kBlockTokens / 8; ++n) {
      for (int i = 0; i < 4; ++i) dscores[n][i] = weights[n][i] * (dscores[n][i] - delta[i / 2]);
    }
    ring.first(slot).weigh(dscores, dq);
  });

  if (idle) return;
  // The first slot now holds the result, a strip for each warp.
  const float scale = static_cast<float>(shape.scale);
  ring.tile(0).store(row, dq, {scale, scale}, TokenRows<T>(p.dq, shape, tile.head), mask, first, tile.end);
}

}  // namespace

cudaError_t launch_tile_dq(const SparseAttentionBackward& params, cudaStream_t stream) {
  return with_tile_kernel(params.shape, [&](auto element, auto channels) {
    using T = decltype(element);
    constexpr int kChannels = decltype(channels)::value;
    return launch(dq_kernel<T, kChannels>, query_tiles(params.shape), kTileThreads, TileRing<T, kChannels>::kBytes,
                  stream, params);
  });
}

}  // namespace dalle_fast::attention
