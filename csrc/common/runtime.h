// cudaError_t and cudaStream_t, for headers that name a launch.
#pragma once

#if defined(DALLE_FAST_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#elif defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include <cuda_runtime_api.h>
#endif
