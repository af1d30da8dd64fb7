// Bound by memory: one pass, 16 bytes a parameter in and 8 out. Elementwise, so any split gives the same bits.
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "adamw16.h"
#include "minifloat.h"
#include "simd.h"

namespace dalle_fast {
namespace {

constexpr int64_t kGrain = 16384;  // elements worth a thread

DF_ALWAYS_INLINE void update(const AdamW16& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float grad = p.grad[i];
    float mean = minifloat_decode<Minifloat::k1_6_9>(p.mean[i]);
    mean += p.mean_rate * (grad - mean);
    float variance = minifloat_decode<Minifloat::k0_6_10>(p.variance[i]) * p.beta2 + grad * grad * p.variance_rate;
    variance = variance > 5.0f ? 5.0f : variance;  // appendix D
    const float step = (mean / p.mean_correction) / (std::sqrt(variance / p.variance_correction) + p.eps);
    p.param[i] = p.param[i] * p.decay - p.lr * step;
    p.mean[i] = minifloat_encode<Minifloat::k1_6_9>(mean);
    p.variance[i] = minifloat_encode<Minifloat::k0_6_10>(variance);
  }
}

}  // namespace

void adamw16_cpu(const AdamW16& params) {
  torch::stable::parallel_for(0, params.n, kGrain, [&](int64_t begin, int64_t end) {
    simd([=]() DF_INLINE_LAMBDA { update(params, begin, end); });
  });
}

}  // namespace dalle_fast
