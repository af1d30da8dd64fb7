// The 16-bit resblocks around the float32 residual stream (section 2.4): parameters of the kernels, without torch.
#pragma once

#include <cstdint>

#include "common/format.h"

#ifdef DALLE_FAST_CUDA
#include "common/runtime.h"
#endif

namespace dalle_fast {

// Rows of `width` elements, contiguous. T: the stream's type; branch and normed have that or a 16-bit one.
template <typename T>
struct ResidualLayerNorm {
  int64_t rows, width;
  double eps;
  const T* x;
  const void* branch;  // null: the sum is x, and total is not written
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
  const T* grad_total;      // null: zeros
  const void* grad_normed;  // scaled by scale_in
  Format normed_format;
  const float *scale_in, *scale_out;  // one element each; null: 1
  int32_t* nonfinite;  // one element, set to 1 if grad_normed holds Inf or NaN, which count as 0; null: as they are
  const T *total, *weight, *mean, *rstd;
  T* grad_x;
  void* grad_branch;  // grad_x scaled by scale_out, in the branch's format; null if that is grad_x itself
  Format branch_format;
  T *grad_weight, *grad_bias;  // [width], overwritten
  T* partials;                 // [partial_count, 2, width], scratch of the CUDA kernel
  int partial_count;
};

// n elements, multiplied by the scale, or divided by it with Inf and NaN as 0. One of the formats is float32.
struct GradientScaling {
  int64_t n;
  const void* in;
  Format in_format;
  const float* scale;
  void* out;
  Format out_format;
};

// The scales of n resblocks; nonfinite is cleared.
struct ScaleUpdate {
  int64_t n;
  float* scale;
  int32_t *since_division, *nonfinite;
  float replicas;
};

template <typename T>
void residual_layer_norm_cpu(const ResidualLayerNorm<T>& params);
template <typename T>
void residual_layer_norm_backward_cpu(const ResidualLayerNormBackward<T>& params);
void scale_gradient_cpu(const GradientScaling& params);
void unscale_gradient_cpu(const GradientScaling& params);
void update_scales_cpu(const ScaleUpdate& params);

#ifdef DALLE_FAST_CUDA
template <typename T>
cudaError_t launch_residual_layer_norm(const ResidualLayerNorm<T>& params, cudaStream_t stream);
// Sets partial_count, by which the caller allocates partials.
template <typename T>
cudaError_t count_partials(ResidualLayerNormBackward<T>* params);
template <typename T>
cudaError_t launch_residual_layer_norm_backward(const ResidualLayerNormBackward<T>& params, cudaStream_t stream);
cudaError_t launch_scale_gradient(const GradientScaling& params, cudaStream_t stream);
cudaError_t launch_unscale_gradient(const GradientScaling& params, cudaStream_t stream);
cudaError_t launch_update_scales(const ScaleUpdate& params, cudaStream_t stream);
#endif

}  // namespace dalle_fast
