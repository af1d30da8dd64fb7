// AdamW with 16-bit moments (section 2.4, appendix D): parameters of the kernels, without torch.
#pragma once

#include <cstdint>

#ifdef DALLE_FAST_CUDA
#include "cuda/runtime.h"
#endif

namespace dalle_fast {

struct AdamW16 {
  int64_t n;
  float* param;
  const float* grad;
  uint16_t* mean;      // 1-6-9
  uint16_t* variance;  // 0-6-10
  float lr, eps;
  float beta2;
  float mean_rate, variance_rate;              // 1 - beta
  float mean_correction, variance_correction;  // 1 - beta^step
  float decay;                                 // 1 - lr * weight_decay
};

void adamw16_cpu(const AdamW16& params);
#ifdef DALLE_FAST_CUDA
cudaError_t launch_adamw16(const AdamW16& params, cudaStream_t stream);
#endif

}  // namespace dalle_fast
