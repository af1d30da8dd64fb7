// Launches of the kernels of decode attention, and the length of a window.
#pragma once

#include "attention/params.h"

namespace dalle_fast::attention {

// `window`: length of the longest window, in tokens.
cudaError_t launch_tile_decode(const DecodeAttention& params, int window, cudaStream_t stream);
cudaError_t launch_plain_decode(const DecodeAttention& params, cudaStream_t stream);

// Number of image tokens that `query` sees, itself included.
template <typename Mask>
DF_HOST_DEVICE int window_of(const Mask& mask, int query) {
  int tokens = 0;
  for (int i = 0; i < mask.runs(); ++i) tokens += mask.run(query, i).end - mask.run(query, i).begin;
  return tokens;
}

}  // namespace dalle_fast::attention
