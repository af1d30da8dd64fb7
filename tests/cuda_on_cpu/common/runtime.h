// Replaces csrc/common/runtime.h: the CUDA kernels take tensors of the CPU.
#pragma once

#include "cuda_on_cpu.h"

namespace dalle_fast {

constexpr bool kEveryTensorOnCuda = true;

}  // namespace dalle_fast
