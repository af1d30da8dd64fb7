// Choice of the kernels of sparse attention: on tensor cores if the shape allows.
#include "attention/cuda_sparse_attention.h"

namespace dalle_fast {

using namespace attention;

cudaError_t launch_sparse_attention_forward(const SparseAttentionForward& params, cudaStream_t stream) {
  return on_tensor_cores(params.shape) ? launch_tile_forward(params, stream) : launch_plain_forward(params, stream);
}

cudaError_t launch_sparse_attention_backward(const SparseAttentionBackward& params, cudaStream_t stream) {
  const bool tiles = on_tensor_cores(params.shape);
  const cudaError_t error = tiles ? launch_tile_dq(params, stream) : launch_plain_dq(params, stream);
  if (error != cudaSuccess) return error;
  return tiles ? launch_tile_dkv(params, stream) : launch_plain_dkv(params, stream);
}

}  // namespace dalle_fast
