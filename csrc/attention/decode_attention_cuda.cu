// Choice of the kernel of decode attention: on tensor cores if shape, layout and window allow.
#include <cstdint>

#include "attention/cuda_decode_attention.h"
#include "cuda/device.h"

namespace dalle_fast {

using namespace attention;

namespace {

// Longest window whose slots the kernel on tensor cores keeps in shared memory, which it needs 96 KB of then.
constexpr int kMostWindow = 7168;

}  // namespace

cudaError_t launch_decode_attention(const DecodeAttention& params, cudaStream_t stream) {
  const Grid& grid = params.shape.grid;
  const int window =
      with_mask(params.shape.kind, grid, [&](const auto& mask) { return window_of(mask, grid.image_len() - 1); });
  bool tiles = on_tensor_cores(params.shape) && window <= kMostWindow;
  for (const View* view : {&params.q, &params.k, &params.v, &params.out, &params.text_k, &params.text_v,
                           &params.cache_k, &params.cache_v}) {
    tiles = tiles && has_aligned_rows(*view);
  }
  return tiles ? launch_tile_decode(params, window, stream) : launch_plain_decode(params, stream);
}

}  // namespace dalle_fast
