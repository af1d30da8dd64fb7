// Bound by memory: 4 bytes per element, read once. Three kernels, each in a fixed order: a block sums the squares of a
// chunk, a warp the chunks of a tensor, one warp the tensors. In double, so that no square of a float overflows.
#include <algorithm>

#include "adamw16/adamw16.h"
#include "adamw16/cuda_chunks.h"
#include "cuda/device.h"
#include "cuda/reduce.h"

namespace dalle_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMost = 2048;  // tensors of a launch

struct Table {
  TensorChunks<kMost, kNormChunk> chunks;
  const float* grad[kMost];
};

__global__ void __launch_bounds__(kThreads) sum_chunks(const __grid_constant__ Table table, double* sums) {
  __shared__ double of_warps[kWarps];
  for (uint32_t chunk = blockIdx.x; chunk < table.chunks.total(); chunk += gridDim.x) {
    const int tensor = table.chunks.tensor_of(chunk), n = table.chunks.size_of(chunk, tensor);
    const float* grad = table.grad[tensor] + table.chunks.begin_of(chunk, tensor);
    const bool aligned = reinterpret_cast<uintptr_t>(grad) % sizeof(float4) == 0;
    const int whole = aligned ? n / 4 : 0;
    double sum = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < whole; i += kThreads) {
      const float4 x = reinterpret_cast<const float4*>(grad)[i];
      sum += static_cast<double>(x.x) * x.x + static_cast<double>(x.y) * x.y + static_cast<double>(x.z) * x.z +
             static_cast<double>(x.w) * x.w;
    }
    for (int i = 4 * whole + threadIdx.x; i < n; i += kThreads) sum += static_cast<double>(grad[i]) * grad[i];
    sum = block_reduce<kThreads>(sum, Add{}, of_warps);
    if (threadIdx.x == 0) sums[chunk] = sum;
  }
}

// From the sums of the chunks to those of the tensors.
__global__ void __launch_bounds__(kThreads)
    sum_tensors(const __grid_constant__ Table table, GradientNorm all, const double* sums, double* of_tensors) {
  const int tensor = blockIdx.x * kWarps + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (tensor >= table.chunks.tensors) return;
  double sum = 0;
  for (uint32_t chunk = table.chunks.first[tensor] + lane; chunk < table.chunks.first[tensor + 1]; chunk += kWarp) {
    sum += sums[chunk];
  }
  sum = warp_reduce(sum, Add{});
  if (lane == 0) all.skipped[tensor] = !gradient_norm_counts(all, tensor, sum, of_tensors[tensor]);
}

__global__ void __launch_bounds__(kWarp) sum_all(const double* of_tensors, int64_t n, float* norm) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kWarp) sum += of_tensors[i];
  sum = warp_reduce(sum, Add{});
  if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(sum));
}

}  // namespace

cudaError_t launch_gradient_norm(const GradientNorm& params, cudaStream_t stream) {
  int blocks;
  cudaError_t error = resident_blocks(sum_chunks, kThreads, 0, &blocks);
  double *sums = params.sums, *of_tensors = params.sums + params.chunks;
  GradientNorm part = params;
  for (int64_t begin = 0; begin < params.tensors && error == cudaSuccess; begin += kMost) {
    Table table = {};
    for (int64_t i = begin; i < std::min(begin + kMost, params.tensors); ++i) {
      table.grad[table.chunks.tensors] = params.tensor[i].grad;
      table.chunks.add(params.tensor[i].n);
    }
    part.unscale = params.unscale == nullptr ? nullptr : params.unscale + begin;
    part.skip = params.skip == nullptr ? nullptr : params.skip + begin;
    part.skipped = params.skipped + begin;
    const uint32_t chunks = table.chunks.total();
    if (chunks > 0) error = launch(sum_chunks, std::min<uint32_t>(chunks, blocks), kThreads, 0, stream, table, sums);
    if (error == cudaSuccess) {
      const int warps = (table.chunks.tensors + kWarps - 1) / kWarps;
      error = launch(sum_tensors, warps, kThreads, 0, stream, table, part, sums, of_tensors + begin);
    }
    sums += chunks;
  }
  if (error != cudaSuccess) return error;
  return launch(sum_all, 1, kWarp, 0, stream, of_tensors, params.tensors, params.norm);
}

}  // namespace dalle_fast
