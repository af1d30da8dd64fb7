// Parameters of the attention kernels of every backend, without torch.
#pragma once

#include <cstdint>

#include "common/format.h"
#include "common/mask.h"

#ifdef DALLE_FAST_CUDA
#include "common/runtime.h"
#endif

namespace dalle_fast {

// A tensor [B, H, N, D]; the token stride of a [B, H, D] is 0.
struct View {
  void* data;
  int64_t batch, head, token, channel;  // strides in elements
};

struct AttentionShape {
  int batch, heads, channels;  // B, H, D
  MaskKind kind;
  Grid grid;
  Format format;  // of every view
  double scale;   // of the scores
};

// True if CUDA's tensor cores take the shape; then the views' channels must lie side by side and their rows be aligned
// to 16 bytes.
inline bool on_tensor_cores(const AttentionShape& shape) {
  const bool half = shape.format == Format::kBFloat16 || shape.format == Format::kFloat16;
  return half && shape.channels % 8 == 0 && shape.channels <= 128;
}

// True if rows can be read 16 bytes at a time.
inline bool has_aligned_rows(const View& view) {
  constexpr int64_t kElements = 8;  // of 16 bits
  return view.channel == 1 && view.batch % kElements == 0 && view.head % kElements == 0 &&
         view.token % kElements == 0 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
}

struct SparseAttentionForward {
  AttentionShape shape;
  View q, k, v;
  View out;   // dense
  void* lse;  // [B, H, N] contiguous, natural log; float64 where the views are, else float32
};

struct SparseAttentionBackward {
  AttentionShape shape;
  View dout, q, k, v, out;
  const void* lse;        // as the forward wrote it
  View dq, dk, dv;        // dense
  void* delta = nullptr;  // [B, H, N] as lse, scratch of the CUDA kernels; null on the CPU
};

// `shape.batch` counts candidates. The views q, k, v, out are [C, H, D].
struct DecodeAttention {
  AttentionShape shape;
  int prompts;  // candidates p * C / prompts ... of text p
  View q, k, v;
  View out;               // contiguous
  View text_k, text_v;    // [P, H, text_len, D]
  View cache_k, cache_v;  // [C, H, cache_len, D]
  const int64_t* position;
};

// True if an image token has that raster index.
DF_HOST_DEVICE inline bool is_inside(int64_t position, const Grid& grid) {
  return position >= 0 && position < grid.image_len();
}

void sparse_attention_forward_cpu(const SparseAttentionForward& params);
void sparse_attention_backward_cpu(const SparseAttentionBackward& params);
void decode_attention_cpu(const DecodeAttention& params);

#ifdef DALLE_FAST_CUDA
cudaError_t launch_sparse_attention_forward(const SparseAttentionForward& params, cudaStream_t stream);
cudaError_t launch_sparse_attention_backward(const SparseAttentionBackward& params, cudaStream_t stream);
cudaError_t launch_decode_attention(const DecodeAttention& params, cudaStream_t stream);
#endif

}  // namespace dalle_fast
