// Bound by memory: one pass reads 12 bytes per parameter and writes 8, which hides one square root and one division.
// The elements after the last whole block are padded to a block, so that every element is computed alike.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "adamw16/adamw16.h"
#include "cpu/simd.h"

#ifdef DF_X86
#include <immintrin.h>
#endif

namespace dalle_fast {
namespace {

constexpr int64_t kBlock = 16;              // elements, a multiple of every register
constexpr int64_t kGrain = 16384 / kBlock;  // blocks worth a thread

#define DF_EACH_SIMD "adamw16/cpu_lanes.h"
#include "cpu/each_simd.h"

void update_tensor(const AdamW16Tensor& p, const AdamW16Rates& rates) {
  const auto update = DF_BEST(update);
  const int64_t whole = p.n / kBlock;
  torch::stable::parallel_for(0, whole, kGrain,
                              [&](int64_t begin, int64_t end) { update(p, rates, begin * kBlock, end * kBlock); });
  const int64_t first = whole * kBlock, rest = p.n - first;
  if (rest == 0) return;
  float param[kBlock] = {}, grad[kBlock] = {};
  uint16_t mean[kBlock] = {}, variance[kBlock] = {};
  std::copy_n(p.param + first, rest, param);
  std::copy_n(p.grad + first, rest, grad);
  std::copy_n(p.mean + first, rest, mean);
  std::copy_n(p.variance + first, rest, variance);
  update({kBlock, param, grad, mean, variance}, rates, 0, kBlock);
  std::copy_n(param, rest, p.param + first);
  std::copy_n(mean, rest, p.mean + first);
  std::copy_n(variance, rest, p.variance + first);
}

// In 16 sums side by side: one alone would wait for each addition.
double sum_of_squares(const float* x, int64_t n) {
  return simd([=]() DF_INLINE_LAMBDA {
    constexpr int kSums = 16;
    double sums[kSums] = {};
    const int64_t whole = n / kSums * kSums;
    for (int64_t i = 0; i < whole; i += kSums) {
      for (int j = 0; j < kSums; ++j) sums[j] += static_cast<double>(x[i + j]) * x[i + j];
    }
    for (int64_t i = whole; i < n; ++i) sums[i - whole] += static_cast<double>(x[i]) * x[i];
    double sum = 0;
    for (double part : sums) sum += part;
    return sum;
  });
}

}  // namespace

void adamw16_cpu(const AdamW16& params) {
  AdamW16Rates rates = adamw16_rates(params);
  for (int64_t i = 0; i < params.tensors; ++i) {
    if (params.skip != nullptr && params.skip[i]) continue;
    adamw16_set_tensor(rates, params, i);
    update_tensor(params.tensor[i], rates);
  }
}

void gradient_norm_cpu(const GradientNorm& params) {
  double* sums = params.sums;
  double total = 0;
  for (int64_t i = 0; i < params.tensors; ++i) {
    const GradientTensor& tensor = params.tensor[i];
    const int64_t chunks = norm_chunks(tensor.n);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * kNormChunk;
        sums[chunk] = sum_of_squares(tensor.grad + first, std::min(kNormChunk, tensor.n - first));
      }
    });
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk];
    double square;
    params.skipped[i] = !gradient_norm_counts(params, i, sum, square);
    total += square;
  }
  *params.norm = static_cast<float>(std::sqrt(total));
}

}  // namespace dalle_fast
