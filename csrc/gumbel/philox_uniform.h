// The noise of the kernels by itself, so that tests can compare its bits with the reference.
#pragma once

#include <cstdint>

#ifdef DALLE_FAST_CUDA
#include "common/runtime.h"
#endif

namespace dalle_fast {

// Elements `first` ... `first` + n of the seed's stream, uniform in (0, 1).
struct PhiloxUniform {
  const int64_t* seed;
  int64_t first, n;
  float* out;
};

void philox_uniform_cpu(const PhiloxUniform& params);
#ifdef DALLE_FAST_CUDA
cudaError_t launch_philox_uniform(const PhiloxUniform& params, cudaStream_t stream);
#endif

}  // namespace dalle_fast
