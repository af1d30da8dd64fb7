// Gumbel-softmax relaxation of the quantizer (section 2.1): parameters of the kernels, without torch.
#pragma once

#include <cstdint>

#include "common/format.h"

#ifdef DALLE_FAST_CUDA
#include "common/runtime.h"
#endif

namespace dalle_fast {

// A tensor [B, codes, pixels] that is dense in NCHW (code = pixels, pixel = 1) or channels_last order (1, codes).
struct GridStrides {
  int64_t code, pixel;  // strides in elements; that of the batch is codes * pixels
};

struct GumbelShape {
  int64_t batch, codes, pixels;
  const int64_t* seed;  // on the device of the kernel, so that no step waits for it
  double tau;
};

// stats [B, 4, pixels], for the backward: a reference near the largest noisy logit, the logarithm of the sum of
// exp((noisy - reference) / tau), log-sum-exp of the logits, KL in nats.
enum GumbelStat { kNoisyReference, kNoisyLogSum, kPlainLse, kPixelKl, kGumbelStats };

template <typename S>
struct GumbelForward {
  GumbelShape shape;
  GridStrides strides;  // of logits and y
  bool hard;
  const S* logits;
  S* y;
  Arithmetic<S>* kl;  // [B], nats
  int64_t* codes;     // [B, pixels], argmax of the noisy logits
  Arithmetic<S>* stats;
};

template <typename S>
struct GumbelBackward {
  GumbelShape shape;
  GridStrides strides;     // of logits and grad_logits
  GridStrides dy_strides;  // of grad_y
  const S* logits;
  const Arithmetic<S>* stats;
  const S* grad_y;
  const Arithmetic<S>* grad_kl;  // [B]
  S* grad_logits;
};

template <typename S>
struct QuantizeForward {
  GumbelShape shape;
  int64_t channels;
  GridStrides strides;    // of logits
  GridStrides z_strides;  // of z [B, channels, pixels]
  bool hard;
  const S* logits;
  const S* codebook;  // [codes, channels]
  S* z;
  Arithmetic<S>* kl;
  int64_t* codes;
  Arithmetic<S>* stats;
  Arithmetic<S>* soft;  // [B, pixels, channels], z before `hard` and rounding, for the backward
};

template <typename S>
struct QuantizeBackward {
  GumbelShape shape;
  int64_t channels;
  GridStrides strides;     // of logits and grad_logits
  GridStrides dz_strides;  // of grad_z
  bool hard;
  const S* logits;
  const S* codebook;
  const int64_t* codes;
  const Arithmetic<S>* stats;
  const Arithmetic<S>* soft;
  const S* grad_z;
  const Arithmetic<S>* grad_kl;
  S* grad_logits;
  S* grad_codebook;
  Arithmetic<S>* workspace = nullptr;  // of the CUDA kernel; null on the CPU
};

template <typename S>
void gumbel_softmax_forward_cpu(const GumbelForward<S>& params);
template <typename S>
void gumbel_softmax_backward_cpu(const GumbelBackward<S>& params);
template <typename S>
void gumbel_quantize_forward_cpu(const QuantizeForward<S>& params);
template <typename S>
void gumbel_quantize_backward_cpu(const QuantizeBackward<S>& params);

#ifdef DALLE_FAST_CUDA
template <typename S>
cudaError_t launch_gumbel_softmax_forward(const GumbelForward<S>& params, cudaStream_t stream);
template <typename S>
cudaError_t launch_gumbel_softmax_backward(const GumbelBackward<S>& params, cudaStream_t stream);
template <typename S>
cudaError_t launch_gumbel_quantize_forward(const QuantizeForward<S>& params, cudaStream_t stream);
template <typename S>
cudaError_t launch_gumbel_quantize_backward(const QuantizeBackward<S>& params, cudaStream_t stream);
// Elements of the backward's workspace.
template <typename S>
int64_t gumbel_quantize_workspace(const GumbelShape& shape, int64_t channels);
#endif

}  // namespace dalle_fast
