// One sample per row of logits: parameters of the kernels, without torch.
#pragma once

#include <cstdint>

#include "common/format.h"

#ifdef DALLE_FAST_CUDA
#include "common/runtime.h"
#endif

namespace dalle_fast {

struct Sample {
  int64_t rows, codes;
  const void* logits;           // [rows, codes]
  Format format;                // float32, bfloat16 or float16
  int64_t row_stride;           // in elements; codes lie side by side
  const int64_t *seed, *first;  // on the device of the kernel, so that no step waits for them
  double temperature;
  int64_t top_k;  // codes or more: no limit
  double top_p;   // 1 or more: no limit
  int64_t pitch;  // the noise of row r, code i is element first + r * pitch + i of the seed's stream
  int64_t* out;   // [rows]; -1 where a row has NaN, or no finite largest logit
};

void sample_cpu(const Sample& params);
#ifdef DALLE_FAST_CUDA
cudaError_t launch_sample(const Sample& params, cudaStream_t stream);
#endif

}  // namespace dalle_fast
