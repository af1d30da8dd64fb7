// AdamW with 16-bit moments (section 2.4, appendix D) and the norm of its gradients: parameters of the kernels and the
// update of one element, without torch.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"
#include "common/minifloat.h"

#ifdef DALLE_FAST_CUDA
#include "common/runtime.h"
#endif

namespace dalle_fast {

struct AdamW16Tensor {
  int64_t n;
  float* param;
  const float* grad;
  uint16_t* mean;      // 1-6-9
  uint16_t* variance;  // 0-6-10
};

// From `step` on, addresses on the device; the last three may be null.
struct AdamW16 {
  int64_t tensors;
  const AdamW16Tensor* tensor;  // on the host
  double beta1, beta2, eps;
  const int64_t* step;        // one, from 1
  const float* lr;            // one
  const float* weight_decay;  // [tensors]
  const float* unscale;       // [tensors], factors of the gradients
  const float* clip;          // one factor of all gradients
  const bool* skip;           // [tensors], true for those that stay as they are
};

// The same for all elements of a tensor. The update is step_size * mean / (sqrt(variance) + eps), with the
// corrections of both moments in step_size and eps.
struct AdamW16Rates {
  float mean_rate, variance_rate, beta2;  // 1 - beta1, 1 - beta2
  float step_size, eps;
  float factor;  // of the gradient
  float decay;   // 1 - lr * weight_decay
};

DF_HOST_DEVICE inline AdamW16Rates adamw16_rates(const AdamW16& p) {
  const double step = static_cast<double>(*p.step), root = sqrt(1 - pow(p.beta2, step));
  AdamW16Rates rates = {};
  rates.mean_rate = static_cast<float>(1 - p.beta1);
  rates.variance_rate = static_cast<float>(1 - p.beta2);
  rates.beta2 = static_cast<float>(p.beta2);
  rates.step_size = static_cast<float>(*p.lr / (1 - pow(p.beta1, step)) * root);
  rates.eps = static_cast<float>(p.eps * root);
  return rates;
}

// The rates of all tensors become those of tensor i.
DF_HOST_DEVICE inline void adamw16_set_tensor(AdamW16Rates& rates, const AdamW16& p, int64_t i) {
  rates.factor = (p.unscale != nullptr ? p.unscale[i] : 1.0f) * (p.clip != nullptr ? *p.clip : 1.0f);
  rates.decay = static_cast<float>(1 - static_cast<double>(*p.lr) * p.weight_decay[i]);
}

constexpr float kMaxVariance = 5.0f;  // appendix D

DF_HOST_DEVICE inline void adamw16_element(const AdamW16Rates& rates, float grad, float& param, uint16_t& mean_code,
                                           uint16_t& variance_code) {
#ifdef __CUDA_ARCH__
  grad = __fmul_rn(grad, rates.factor);  // rounded, not fused: as if the gradient had been multiplied beforehand
#else
  grad *= rates.factor;
#endif
  float mean = minifloat_decode<Minifloat::k1_6_9>(mean_code);
  mean += rates.mean_rate * (grad - mean);
  float variance = minifloat_decode<Minifloat::k0_6_10>(variance_code) * rates.beta2;
  variance += grad * grad * rates.variance_rate;
  variance = variance < kMaxVariance ? variance : kMaxVariance;
  param = param * rates.decay - mean * rates.step_size / (sqrtf(variance) + rates.eps);
  mean_code = minifloat_encode<Minifloat::k1_6_9>(mean);
  variance_code = minifloat_encode<Minifloat::k0_6_10>(variance);
}

void adamw16_cpu(const AdamW16& params);

// Squares are summed in chunks of gradients, then the chunks of a tensor, then the tensors.
constexpr int64_t kNormChunk = 16384;

constexpr int64_t norm_chunks(int64_t n) { return (n + kNormChunk - 1) / kNormChunk; }

struct GradientTensor {
  int64_t n;
  const float* grad;
};

struct GradientNorm {
  int64_t tensors, chunks;
  const GradientTensor* tensor;
  const float* unscale;  // [tensors] or null
  const bool* skip;      // [tensors] or null
  double* sums;          // [chunks + tensors], scratch
  float* norm;           // one
  bool* skipped;         // [tensors]
};

// Square of the norm of tensor i, from the sum of its gradient's squares; false if it is skipped.
DF_HOST_DEVICE inline bool gradient_norm_counts(const GradientNorm& p, int64_t i, double sum, double& square) {
  const double unscale = p.unscale != nullptr ? p.unscale[i] : 1.0;
  sum *= unscale * unscale;
  const bool counts = sum < HUGE_VAL && !(p.skip != nullptr && p.skip[i]);  // not so for NaN
  square = counts ? sum : 0;
  return counts;
}

void gradient_norm_cpu(const GradientNorm& params);

#ifdef DALLE_FAST_CUDA
cudaError_t launch_adamw16(const AdamW16& params, cudaStream_t stream);
cudaError_t launch_gradient_norm(const GradientNorm& params, cudaStream_t stream);
#endif

}  // namespace dalle_fast
