// Bound by memory: one pass, 12 bytes a parameter in and 8 out, beside which fit one square root and one division.
// Elementwise: what is left over by whole blocks is padded to one, so that every element is computed alike.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "adamw16.h"
#include "minifloat.h"
#include "simd.h"

#ifdef DF_X86
#include <immintrin.h>
#endif

namespace dalle_fast {
namespace {

constexpr int64_t kBlock = 16;              // elements, of every instruction set's registers a multiple
constexpr int64_t kGrain = 16384 / kBlock;  // blocks worth a thread
constexpr float kMaxVariance = 5.0f;        // appendix D

// The update is step * mean / (sqrt(variance) + eps), with the corrections of both moments in step and eps.
struct Rates {
  float step, eps;
};

// Parameters by value: the compiler sees that the stores cannot change them.
namespace portable {
void update(AdamW16 p, Rates rates, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float grad = p.grad[i];
    float mean = minifloat_decode<Minifloat::k1_6_9>(p.mean[i]);
    mean += p.mean_rate * (grad - mean);
    float variance = minifloat_decode<Minifloat::k0_6_10>(p.variance[i]) * p.beta2 + grad * grad * p.variance_rate;
    variance = variance < kMaxVariance ? variance : kMaxVariance;
    p.param[i] = p.param[i] * p.decay - mean * rates.step / (std::sqrt(variance) + rates.eps);
    p.mean[i] = minifloat_encode<Minifloat::k1_6_9>(mean);
    p.variance[i] = minifloat_encode<Minifloat::k0_6_10>(variance);
  }
}
}  // namespace portable

#ifdef DF_X86
namespace avx2 {
#define DF_TARGET DF_AVX2
#define DF_LANES 8
#include "adamw16_lanes.h"
#undef DF_TARGET
#undef DF_LANES
}  // namespace avx2

namespace avx512 {
#define DF_TARGET DF_AVX512
#define DF_LANES 16
#include "adamw16_lanes.h"
#undef DF_TARGET
#undef DF_LANES
}  // namespace avx512
#endif

void update(const AdamW16& p, const Rates& rates, int64_t begin, int64_t end) {
#ifdef DF_X86
  if (simd_level() == Simd::kAvx512) return avx512::update(p, rates, begin, end);
  if (simd_level() == Simd::kAvx2) return avx2::update(p, rates, begin, end);
#endif
  portable::update(p, rates, begin, end);
}

}  // namespace

void adamw16_cpu(const AdamW16& params) {
  const float root = std::sqrt(params.variance_correction);
  const Rates rates{params.lr / params.mean_correction * root, params.eps * root};
  const int64_t whole = params.n / kBlock;
  torch::stable::parallel_for(0, whole, kGrain,
                              [&](int64_t begin, int64_t end) { update(params, rates, begin * kBlock, end * kBlock); });
  const int64_t first = whole * kBlock, rest = params.n - first;
  if (rest == 0) return;
  float param[kBlock] = {}, grad[kBlock] = {};
  uint16_t mean[kBlock] = {}, variance[kBlock] = {};
  std::copy_n(params.param + first, rest, param);
  std::copy_n(params.grad + first, rest, grad);
  std::copy_n(params.mean + first, rest, mean);
  std::copy_n(params.variance + first, rest, variance);
  AdamW16 padded = params;
  padded.param = param;
  padded.grad = grad;
  padded.mean = mean;
  padded.variance = variance;
  update(padded, rates, 0, kBlock);
  std::copy_n(param, rest, params.param + first);
  std::copy_n(mean, rest, params.mean + first);
  std::copy_n(variance, rest, params.variance + first);
}

}  // namespace dalle_fast
