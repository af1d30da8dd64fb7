// The 16-bit resblocks around the float32 residual stream (section 2.4): parameters of the kernels, without torch.
#pragma once

#include <cstdint>

namespace dalle_fast {

enum class Format { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Rows of `width` elements, contiguous. T: the stream's type; branch and normed have their own.
template <typename T>
struct ResidualLayerNorm {
  int64_t rows, width;
  double eps;
  const T* x;
  const void* branch;
  Format branch_format;
  const T *weight, *bias;  // [width]
  T* total;
  void* normed;
  Format normed_format;
  T *mean, *rstd;  // [rows], for the backward
};

template <typename T>
struct ResidualLayerNormBackward {
  int64_t rows, width;
  const T* grad_total;
  const void* grad_normed;
  Format normed_format;
  const T *total, *weight, *mean, *rstd;
  T* grad_x;
  void* grad_branch;  // grad_x in the branch's format; null if that is the stream's
  Format branch_format;
  T *grad_weight, *grad_bias;  // [width], overwritten
};

template <typename T>
void residual_layer_norm_cpu(const ResidualLayerNorm<T>& params);
template <typename T>
void residual_layer_norm_backward_cpu(const ResidualLayerNormBackward<T>& params);

// out = in * scale, and out = (finite in, else 0) / scale; n elements.
void scale_gradient_cpu(const float* in, float scale, int64_t n, void* out, Format out_format);
void unscale_gradient_cpu(const void* in, Format in_format, float scale, int64_t n, float* out);

}  // namespace dalle_fast
