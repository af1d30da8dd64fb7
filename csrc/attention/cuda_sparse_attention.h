// Launches of the kernels of sparse attention. Those on tensor cores need a shape that on_tensor_cores() accepts, rows
// aligned to 16 bytes and channels side by side; the plain ones take everything.
#pragma once

#include "attention/params.h"

namespace dalle_fast::attention {

cudaError_t launch_tile_forward(const SparseAttentionForward& params, cudaStream_t stream);
cudaError_t launch_tile_dq(const SparseAttentionBackward& params, cudaStream_t stream);   // and delta
cudaError_t launch_tile_dkv(const SparseAttentionBackward& params, cudaStream_t stream);  // from delta

cudaError_t launch_plain_forward(const SparseAttentionForward& params, cudaStream_t stream);
cudaError_t launch_plain_dq(const SparseAttentionBackward& params, cudaStream_t stream);
cudaError_t launch_plain_dkv(const SparseAttentionBackward& params, cudaStream_t stream);

}  // namespace dalle_fast::attention
