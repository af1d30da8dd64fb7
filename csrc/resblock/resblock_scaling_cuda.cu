// scale_gradient and unscale_gradient: elementwise, bound by memory. update_scales: one thread per resblock. All
// overwrite what they write; a grid as large as runs at once takes all elements.
#include "resblock/cuda_rows.h"
#include "resblock/resblock.h"
#include "resblock/scale_state.h"

namespace dalle_fast {

using namespace resblock;

namespace {

constexpr int kThreads = 256;

// Calls body(i) for the thread's share of n elements.
template <typename Body>
DF_DEVICE void for_each_element(int64_t n, const Body& body) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) body(i);
}

__global__ void __launch_bounds__(kThreads) scale_kernel(GradientScaling p) {
  const float scale = *p.scale;
  const auto* in = static_cast<const float*>(p.in);
  with_branch_format<float>(p.out_format, [&](auto element) {
    using S = decltype(element);
    auto* out = static_cast<S*>(p.out);
    for_each_element(p.n, [&](int64_t i) { out[i] = narrow<S>(in[i] * scale); });
  });
}

__global__ void __launch_bounds__(kThreads) unscale_kernel(GradientScaling p) {
  const float scale = *p.scale;
  auto* out = static_cast<float*>(p.out);
  with_branch_format<float>(p.in_format, [&](auto element) {
    const auto* in = static_cast<const decltype(element)*>(p.in);
    for_each_element(p.n, [&](int64_t i) {
      const float x = widen(in[i]);
      out[i] = (is_finite(x) ? x : 0.0f) / scale;
    });
  });
}

__global__ void __launch_bounds__(kThreads) update_kernel(ScaleUpdate p) {
  for_each_element(p.n, [&](int64_t i) {
    const ScaleState next = next_scale({p.scale[i], p.since_division[i]}, p.nonfinite[i] != 0, p.replicas);
    p.scale[i] = next.scale;
    p.since_division[i] = next.since_division;
    p.nonfinite[i] = 0;
  });
}

template <typename Params>
cudaError_t launch_elementwise(void (*kernel)(Params), const Params& p, cudaStream_t stream) {
  if (p.n == 0) return cudaSuccess;
  int blocks;
  const cudaError_t error = resident_blocks(kernel, kThreads, 0, &blocks);
  if (error != cudaSuccess) return error;
  const int64_t wanted = (p.n + kThreads - 1) / kThreads;
  return launch(kernel, wanted < blocks ? static_cast<int>(wanted) : blocks, kThreads, 0, stream, p);
}

}  // namespace

cudaError_t launch_scale_gradient(const GradientScaling& p, cudaStream_t stream) {
  return launch_elementwise(scale_kernel, p, stream);
}

cudaError_t launch_unscale_gradient(const GradientScaling& p, cudaStream_t stream) {
  return launch_elementwise(unscale_kernel, p, stream);
}

cudaError_t launch_update_scales(const ScaleUpdate& p, cudaStream_t stream) {
  return launch_elementwise(update_kernel, p, stream);
}

}  // namespace dalle_fast
