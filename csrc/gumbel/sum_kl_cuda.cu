// The KL of each image from that of its pixels: one block per image, which sums in double and in a fixed order.
#include "cuda/reduce.h"
#include "gumbel/cuda_quad.h"

namespace dalle_fast::gumbel {
namespace {

constexpr int kThreads = 512;

template <typename T>
__global__ void __launch_bounds__(kThreads) sum_kl_kernel(int64_t pixels, const T* stats, T* kl) {
  __shared__ double scratch[kThreads / kWarp];
  const T* pixel_kl = stats + (int64_t{blockIdx.x} * kGumbelStats + kPixelKl) * pixels;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < pixels; i += kThreads) sum += pixel_kl[i];
  sum = block_reduce<kThreads>(sum, Add{}, scratch);
  if (threadIdx.x == 0) kl[blockIdx.x] = static_cast<T>(sum);
}

}  // namespace

template <typename T>
cudaError_t launch_sum_kl(const GumbelShape& shape, const T* stats, T* kl, cudaStream_t stream) {
  return launch(sum_kl_kernel<T>, static_cast<unsigned>(shape.batch), kThreads, 0, stream, shape.pixels, stats, kl);
}

template cudaError_t launch_sum_kl(const GumbelShape&, const float*, float*, cudaStream_t);
template cudaError_t launch_sum_kl(const GumbelShape&, const double*, double*, cudaStream_t);

}  // namespace dalle_fast::gumbel
