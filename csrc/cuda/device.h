// The first include of every kernel: the CUDA language, from nvcc or, in tests without a GPU, from tests/cuda_on_cpu.
#pragma once

#include <cstdint>
#include <utility>

#include "common/runtime.h"

// A kernel's phases are functions, or members of a class that has no arrays: the kernel holds those and passes them.
// The compiler keeps an object with an array that a loop indexes out of registers until it has unrolled that loop.
#define DF_DEVICE __device__ __forceinline__

namespace dalle_fast {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// Shared memory that a block can have on the current device, static and dynamic, in bytes.
inline cudaError_t max_shared_bytes(int* bytes) {
  int device;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// Allows the kernel all of that, not what one launch takes: the limit belongs to the kernel, and another thread may be
// about to launch it with more.
inline cudaError_t allow_shared_memory(const void* kernel) {
  int most;
  cudaFuncAttributes attributes;
  cudaError_t error = max_shared_bytes(&most);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  const int dynamic = most - static_cast<int>(attributes.sharedSizeBytes);
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic);
}

// Starts `kernel` on `stream`: grid and block in blocks and threads, shared_bytes of dynamic shared memory.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
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
}

// Number of blocks that run at once, for a kernel that loops over its work.
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
