// From the checks of an op to its kernel: one C++ function serves the CPU and CUDA.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#ifdef DALLE_FAST_CUDA
#include "common/runtime.h"
#endif

namespace dalle_fast {

// Whether the CUDA kernel takes this tensor.
inline bool on_cuda(const torch::stable::Tensor& x) {
#ifdef DALLE_FAST_CUDA
  return kEveryTensorOnCuda || x.is_cuda();
#else
  return false;
#endif
}

#ifdef DALLE_FAST_CUDA

inline void check_launch(cudaError_t error, const char* op) {
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch, of whomever, would report it once more
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the CUDA kernel was not launched: ", cudaGetErrorString(error));
}

// Calls launch(stream) with the device of x current, on torch's stream there.
template <typename Launch>
void launch_on_device_of(const torch::stable::Tensor& x, const char* op, const Launch& launch) {
  if constexpr (kEveryTensorOnCuda) {
    check_launch(launch(cudaStream_t{}), op);
  } else {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    check_launch(launch(static_cast<cudaStream_t>(stream)), op);
  }
}

#endif

}  // namespace dalle_fast

// DF_RUN(op, x, params) calls op_cpu(params), or launch_op(params, stream) when x is on CUDA.
// DF_REGISTER(library) { library.impl(...); } registers for every device that this build has kernels for.
#ifdef DALLE_FAST_CUDA
#define DF_RUN(op, x, ...)                                                                                            \
  do {                                                                                                                \
    if (dalle_fast::on_cuda(x)) {                                                                                     \
      dalle_fast::launch_on_device_of(x, #op, [&](cudaStream_t stream) { return launch_##op(__VA_ARGS__, stream); }); \
    } else {                                                                                                          \
      op##_cpu(__VA_ARGS__);                                                                                          \
    }                                                                                                                 \
  } while (false)
#define DF_REGISTER(library)                                              \
  template <typename Library>                                             \
  static void register_kernels(Library& library);                         \
  STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) { register_kernels(m); }  \
  STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CUDA, m) { register_kernels(m); } \
  template <typename Library>                                             \
  static void register_kernels(Library& library)
#else
#define DF_RUN(op, x, ...) op##_cpu(__VA_ARGS__)
#define DF_REGISTER(library) STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, library)
#endif
