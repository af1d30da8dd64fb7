// What every kernel includes first: the CUDA language, from nvcc or, in tests without a GPU, from tests/cuda_on_cpu.
#pragma once

#include <cstdint>
#include <utility>

#include "common/runtime.h"

#define DF_DEVICE __device__ __forceinline__

// The block's dynamic shared memory as `unsigned char* name`.
#ifdef DALLE_FAST_CUDA_ON_CPU
#define DF_SHARED(name) unsigned char* const name = cuda_on_cpu::dynamic_shared()
#else
#define DF_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace dalle_fast {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

#ifndef DALLE_FAST_CUDA_ON_CPU
// Lets the kernel have all the shared memory of a block on the current device, not what one launch takes: the limit is
// the kernel's, and another thread may be about to launch it with more.
inline cudaError_t allow_shared_memory(const void* kernel) {
  int device, most;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  const int dynamic = most - static_cast<int>(attributes.sharedSizeBytes);
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic);
}
#endif

// Starts `kernel` on `stream`: grid and block in blocks and threads, shared_bytes of dynamic shared memory.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
#ifdef DALLE_FAST_CUDA_ON_CPU
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  return cuda_on_cpu::run(grid, block, shared_bytes, [&] { std::apply(kernel, values); });
#else
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
#endif
}

// Sets a flag that any thread of any block may set, all to the same value.
DF_DEVICE void raise_flag(int32_t* flag) {
#ifdef DALLE_FAST_CUDA_ON_CPU
  __atomic_store_n(flag, 1, __ATOMIC_RELAXED);  // what ThreadSanitizer knows to be no race
#else
  *flag = 1;
#endif
}

// Blocks for a kernel that takes a fixed number of them: as many as run at once.
template <typename Kernel>
cudaError_t resident_blocks(Kernel kernel, int threads, size_t shared_bytes, int* blocks) {
  int device, processors, per_processor;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, shared_bytes);
  }
  if (error == cudaSuccess) *blocks = processors * per_processor;
  return error;
}

}  // namespace dalle_fast
