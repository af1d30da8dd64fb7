// cudaError_t and cudaStream_t, for headers that name a launch. The emulation has its own, in tests/cuda_on_cpu.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include <cuda_runtime_api.h>
#endif

namespace dalle_fast {

constexpr bool kEveryTensorOnCuda = false;  // true in the emulation, whose CUDA kernels take tensors of the CPU

}  // namespace dalle_fast
