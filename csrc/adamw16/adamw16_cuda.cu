// Bound by memory: one pass in place, 12 bytes per parameter read and 8 written. All tensors form one row of chunks,
// over which as many blocks go as run at once; a thread updates eight neighbours, 16 bytes at a time where addresses
// allow it.
#include <algorithm>

#include "adamw16/adamw16.h"
#include "adamw16/cuda_chunks.h"
#include "cuda/device.h"

namespace dalle_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = 8;    // elements of a thread
constexpr int kMost = 784;  // tensors of a launch: the arguments of a kernel are 32,764 bytes at most

struct Table {
  TensorChunks<kMost, kThreads * kEach> chunks;
  float* param[kMost];
  const float* grad[kMost];
  uint16_t* mean[kMost];
  uint16_t* variance[kMost];
};

// Eight elements, of which load() and store() touch the first n in memory.
template <typename T>
struct alignas(16) Eight {
  T x[kEach];
};

template <typename T>
DF_DEVICE Eight<T> load(const T* from, int n) {
  Eight<T> to = {};
  if (n >= kEach && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    constexpr int kWords = sizeof(to) / sizeof(uint4);
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<uint4*>(to.x)[i] = reinterpret_cast<const uint4*>(from)[i];
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (i < n) to.x[i] = from[i];
    }
  }
  return to;
}

template <typename T>
DF_DEVICE void store(const Eight<T>& from, T* to, int n) {
  if (n >= kEach && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    constexpr int kWords = sizeof(from) / sizeof(uint4);
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from.x)[i];
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (i < n) to[i] = from.x[i];
    }
  }
}

__global__ void __launch_bounds__(kThreads) adamw16_kernel(const __grid_constant__ Table table, AdamW16 all) {
  __shared__ AdamW16Rates of_step;
  if (threadIdx.x == 0) of_step = adamw16_rates(all);
  __syncthreads();
  AdamW16Rates rates = of_step;
  for (uint32_t chunk = blockIdx.x; chunk < table.chunks.total(); chunk += gridDim.x) {
    const int tensor = table.chunks.tensor_of(chunk);
    if (all.skip != nullptr && all.skip[tensor]) continue;
    const int n = table.chunks.size_of(chunk, tensor) - static_cast<int>(threadIdx.x) * kEach;
    if (n <= 0) continue;
    const int64_t begin = table.chunks.begin_of(chunk, tensor) + threadIdx.x * kEach;
    const Eight<float> grad = load(table.grad[tensor] + begin, n);
    Eight<float> param = load(table.param[tensor] + begin, n);
    Eight<uint16_t> mean = load(table.mean[tensor] + begin, n), variance = load(table.variance[tensor] + begin, n);
    adamw16_set_tensor(rates, all, tensor);
#pragma unroll
    for (int i = 0; i < kEach; ++i) adamw16_element(rates, grad.x[i], param.x[i], mean.x[i], variance.x[i]);
    store(param, table.param[tensor] + begin, n);
    store(mean, table.mean[tensor] + begin, n);
    store(variance, table.variance[tensor] + begin, n);
  }
}

}  // namespace

cudaError_t launch_adamw16(const AdamW16& params, cudaStream_t stream) {
  int blocks;
  cudaError_t error = resident_blocks(adamw16_kernel, kThreads, 0, &blocks);
  AdamW16 part = params;
  for (int64_t begin = 0; begin < params.tensors && error == cudaSuccess; begin += kMost) {
    Table table = {};
    for (int64_t i = begin; i < std::min(begin + kMost, params.tensors); ++i) {
      const int row = table.chunks.tensors;
      const AdamW16Tensor& tensor = params.tensor[i];
      table.param[row] = tensor.param;
      table.grad[row] = tensor.grad;
      table.mean[row] = tensor.mean;
      table.variance[row] = tensor.variance;
      table.chunks.add(tensor.n);
    }
    const uint32_t chunks = table.chunks.total();
    if (chunks == 0) continue;
    part.weight_decay = params.weight_decay + begin;
    part.unscale = params.unscale == nullptr ? nullptr : params.unscale + begin;
    part.skip = params.skip == nullptr ? nullptr : params.skip + begin;
    error = launch(adamw16_kernel, std::min<uint32_t>(chunks, blocks), kThreads, 0, stream, table, part);
  }
  return error;
}

}  // namespace dalle_fast
