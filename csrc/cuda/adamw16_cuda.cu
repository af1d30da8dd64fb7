// Bound by memory: one pass, 12 bytes a parameter in and 8 out. Elementwise, a thread a parameter.
#include "adamw16.h"
#include "cuda/device.h"
#include "minifloat.h"

namespace dalle_fast {
namespace {

constexpr int kThreads = 256;
constexpr float kMaxVariance = 5.0f;  // appendix D

__global__ void __launch_bounds__(kThreads) adamw16_kernel(AdamW16 p, float step, float eps) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.n; i += stride) {
    const float grad = p.grad[i];
    float mean = minifloat_decode<Minifloat::k1_6_9>(p.mean[i]);
    mean += p.mean_rate * (grad - mean);
    float variance = minifloat_decode<Minifloat::k0_6_10>(p.variance[i]) * p.beta2 + grad * grad * p.variance_rate;
    variance = variance < kMaxVariance ? variance : kMaxVariance;
    p.param[i] = p.param[i] * p.decay - mean * step / (sqrtf(variance) + eps);
    p.mean[i] = minifloat_encode<Minifloat::k1_6_9>(mean);
    p.variance[i] = minifloat_encode<Minifloat::k0_6_10>(variance);
  }
}

}  // namespace

cudaError_t launch_adamw16(const AdamW16& params, cudaStream_t stream) {
  if (params.n == 0) return cudaSuccess;
  int blocks;
  const cudaError_t error = resident_blocks(adamw16_kernel, kThreads, 0, &blocks);
  if (error != cudaSuccess) return error;
  const float root = sqrtf(params.variance_correction);
  return launch(adamw16_kernel, blocks, kThreads, 0, stream, params, params.lr / params.mean_correction * root,
                params.eps * root);
}

}  // namespace dalle_fast
