// A thread draws the four elements of one block of Philox, so that no block is computed twice.
#include "common/rng.h"
#include "cuda/device.h"
#include "gumbel/philox_uniform.h"

namespace dalle_fast {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) philox_uniform_kernel(PhiloxUniform p) {
  const int64_t draw = int64_t{blockIdx.x} * kThreads + threadIdx.x, block = p.first / 4 + draw;
  const PhiloxWords words = philox(static_cast<uint64_t>(*p.seed), static_cast<uint64_t>(block));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t index = draw * 4 + i - p.first % 4;
    if (index >= 0 && index < p.n) p.out[index] = uniform_from_word(words.word[i]);
  }
}

}  // namespace

cudaError_t launch_philox_uniform(const PhiloxUniform& params, cudaStream_t stream) {
  if (params.n == 0) return cudaSuccess;
  const int64_t draws = (params.first % 4 + params.n + 3) / 4;
  const auto blocks = static_cast<unsigned>((draws + kThreads - 1) / kThreads);
  return launch(philox_uniform_kernel, blocks, kThreads, 0, stream, params);
}

}  // namespace dalle_fast
