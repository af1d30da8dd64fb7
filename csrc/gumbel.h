// Gumbel-softmax relaxation of the quantizer (section 2.1): parameters of the kernels, without torch.
#pragma once

#include <cstdint>

namespace dalle_fast {

// A tensor [B, codes, pixels] that is dense in NCHW (code = pixels, pixel = 1) or channels_last order (1, codes).
struct GridStrides {
  int64_t code, pixel;  // strides in elements; that of the batch is codes * pixels
};

struct GumbelShape {
  int64_t batch, codes, pixels;
  uint64_t seed;
  double tau;
};

// stats [B, 3, pixels], for the backward: log-sum-exp of the noisy logits / tau, log-sum-exp of the logits, KL in nats.
enum GumbelStat { kNoisyLse, kPlainLse, kPixelKl, kGumbelStats };

template <typename T>
struct GumbelForward {
  GumbelShape shape;
  GridStrides strides;  // of logits and y
  bool hard;
  const T* logits;
  T* y;
  T* kl;           // [B], nats
  int64_t* codes;  // [B, pixels], argmax of the noisy logits
  T* stats;
};

template <typename T>
struct GumbelBackward {
  GumbelShape shape;
  GridStrides strides;     // of logits and grad_logits
  GridStrides dy_strides;  // of grad_y
  const T* logits;
  const T* stats;
  const T* grad_y;
  const T* grad_kl;  // [B]
  T* grad_logits;
};

template <typename T>
void gumbel_softmax_forward_cpu(const GumbelForward<T>& params);
template <typename T>
void gumbel_softmax_backward_cpu(const GumbelBackward<T>& params);

}  // namespace dalle_fast
