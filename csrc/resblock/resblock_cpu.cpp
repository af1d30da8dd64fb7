// One thread takes whole rows: a row is read from memory once and stays in the cache for the two passes of its mean and
// variance. The gradients of weight and bias are sums over rows: each of a fixed number of row blocks writes its own
// partial sum, and the partials are added in order, so that the result does not depend on the number of threads. Inf
// and NaN in a scaled gradient become 0 before they reach any sum.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/format.h"
#include "cpu/huge_pages.h"
#include "cpu/simd.h"
#include "resblock/resblock.h"
#include "resblock/scale_state.h"

namespace dalle_fast {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kGrain = 32768;   // elements worth a thread
constexpr int64_t kMaxBlocks = 32;  // of rows

int64_t row_grain(int64_t width) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)); }

// Sum of term(i) for 0 <= i < n, in four parts side by side: one alone would wait for each addition.
template <typename T, typename Term>
DF_ALWAYS_INLINE T sum_of(int64_t n, const Term& term) {
  const int64_t part = n / 4;
  T a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < part; ++i) {
    a += term(i);
    b += term(i + part);
    c += term(i + 2 * part);
    d += term(i + 3 * part);
  }
  for (int64_t i = 4 * part; i < n; ++i) a += term(i);
  return (a + b) + (c + d);
}

template <typename T>
DF_ALWAYS_INLINE bool is_finite(T x) {
  return std::fabs(x) <= std::numeric_limits<T>::max();
}

template <typename T>
DF_ALWAYS_INLINE void forward_rows_body(const ResidualLayerNorm<T>& p, int64_t begin, int64_t end) {
  const int64_t width = p.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = p.x + row * width;
    const T* total = x;
    if (p.branch != nullptr) {
      T* out = p.total + row * width;
      with_format(p.branch_format, [&](auto element) DF_INLINE_LAMBDA {
        using S = decltype(element);
        const auto* branch = static_cast<const S*>(p.branch) + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) out[i] = x[i] + widen(branch[i]);
      });
      total = out;
    }
    // Sums of the total as it is stored: without the branch, as recompute normalises it, they are the same bit by bit.
    const T mean = sum_of<T>(width, [&](int64_t i) DF_INLINE_LAMBDA { return total[i]; }) / width;
    const auto square = [&](int64_t i) DF_INLINE_LAMBDA { return (total[i] - mean) * (total[i] - mean); };
    const T rstd = 1 / std::sqrt(sum_of<T>(width, square) / width + static_cast<T>(p.eps));
    with_format(p.normed_format, [&](auto element) DF_INLINE_LAMBDA {
      using S = decltype(element);
      auto* normed = static_cast<S*>(p.normed) + row * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) normed[i] = narrow<S>((total[i] - mean) * rstd * p.weight[i] + p.bias[i]);
    });
    p.mean[row] = mean;
    p.rstd[row] = rstd;
  }
}

void forward_rows(const ResidualLayerNorm<float>& p, int64_t begin, int64_t end) {
  simd([=]() DF_INLINE_LAMBDA { forward_rows_body(p, begin, end); });
}

void forward_rows(const ResidualLayerNorm<double>& p, int64_t begin, int64_t end) {
  simd([=]() DF_INLINE_LAMBDA { forward_rows_body(p, begin, end); });
}

// Sums and scratch of a block of rows.
template <typename T>
struct BlockGradients {
  T *weight, *bias;    // [width], zero at first
  int32_t* nonfinite;  // zero at first
  T* normal_grad;      // [width], scratch for a row's gradient before weight and bias
  const T* zeros;      // [width]
};

template <bool filter, typename T>
DF_ALWAYS_INLINE void backward_rows_body(const ResidualLayerNormBackward<T>& p, int64_t begin, int64_t end,
                                         const BlockGradients<T>& block) {
  const int64_t width = p.width;
  const T unscale = p.scale_in == nullptr ? T(1) : 1 / static_cast<T>(*p.scale_in);
  const T scale_out = p.scale_out == nullptr ? T(1) : static_cast<T>(*p.scale_out);
  T *grad_weight = block.weight, *grad_bias = block.bias, *grad = block.normal_grad;
  int32_t nonfinite = 0;
  for (int64_t row = begin; row < end; ++row) {
    const T* total = p.total + row * width;
    const T* grad_total = p.grad_total == nullptr ? block.zeros : p.grad_total + row * width;
    T* grad_x = p.grad_x + row * width;
    const T mean = p.mean[row], rstd = p.rstd[row];
    T grad_sum = 0, product_sum = 0;
    with_format(p.normed_format, [&](auto element) DF_INLINE_LAMBDA {
      using S = decltype(element);
      const auto* grad_normed = static_cast<const S*>(p.grad_normed) + row * width;
#pragma omp simd reduction(+ : grad_sum, product_sum) reduction(| : nonfinite)
      for (int64_t i = 0; i < width; ++i) {
        T value = widen(grad_normed[i]);
        if constexpr (filter) {
          const bool finite = is_finite(value);
          nonfinite |= finite ? 0 : 1;
          value = finite ? value : T(0);
        }
        value *= unscale;
        const T normal = (total[i] - mean) * rstd;
        grad_weight[i] += value * normal;
        grad_bias[i] += value;
        grad[i] = value * p.weight[i];
        grad_sum += grad[i];
        product_sum += grad[i] * normal;
      }
    });
    const T grad_mean = grad_sum / width, product_mean = product_sum / width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const T normal = (total[i] - mean) * rstd;
      grad_x[i] = grad_total[i] + rstd * (grad[i] - grad_mean - normal * product_mean);
    }
    if (p.grad_branch == nullptr) continue;
    with_format(p.branch_format, [&](auto element) DF_INLINE_LAMBDA {
      using S = decltype(element);
      auto* grad_branch = static_cast<S*>(p.grad_branch) + row * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) grad_branch[i] = narrow<S>(grad_x[i] * scale_out);
    });
  }
  *block.nonfinite |= nonfinite;
}

template <typename T>
void backward_rows(const ResidualLayerNormBackward<T>& p, int64_t begin, int64_t end, const BlockGradients<T>& block) {
  if (p.nonfinite != nullptr) {
    simd([=]() DF_INLINE_LAMBDA { backward_rows_body<true>(p, begin, end, block); });
  } else {
    simd([=]() DF_INLINE_LAMBDA { backward_rows_body<false>(p, begin, end, block); });
  }
}

}  // namespace

template <typename T>
void residual_layer_norm_cpu(const ResidualLayerNorm<T>& params) {
  const int64_t n = params.rows * params.width;
  if (params.branch != nullptr) advise_huge(params.total, n * sizeof(T));
  advise_huge(params.normed, params.normed_format, n);
  parallel_for(0, params.rows, row_grain(params.width),
               [&](int64_t begin, int64_t end) { forward_rows(params, begin, end); });
}

template <typename T>
void residual_layer_norm_backward_cpu(const ResidualLayerNormBackward<T>& params) {
  const int64_t width = params.width, n = params.rows * width;
  advise_huge(params.grad_x, n * sizeof(T));
  if (params.grad_branch != nullptr) advise_huge(params.grad_branch, params.branch_format, n);
  const int64_t block_rows = std::max(row_grain(width), (params.rows + kMaxBlocks - 1) / kMaxBlocks);
  const int64_t blocks = (params.rows + block_rows - 1) / block_rows;
  std::vector<T> partials(blocks * 2 * width);  // [blocks, weight and bias, width]
  std::vector<int32_t> nonfinite(blocks);
  const std::vector<T> zeros(params.grad_total == nullptr ? width : 0);
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> normal_grad(width);
    for (int64_t block = begin; block < end; ++block) {
      T* partial = partials.data() + block * 2 * width;
      backward_rows(params, block * block_rows, std::min(params.rows, (block + 1) * block_rows),
                    BlockGradients<T>{partial, partial + width, &nonfinite[block], normal_grad.data(), zeros.data()});
    }
  });
  std::fill_n(params.grad_weight, width, T(0));
  std::fill_n(params.grad_bias, width, T(0));
  for (int64_t block = 0; block < blocks; ++block) {
    const T* partial = partials.data() + block * 2 * width;
    for (int64_t i = 0; i < width; ++i) {
      params.grad_weight[i] += partial[i];
      params.grad_bias[i] += partial[width + i];
    }
    if (nonfinite[block] != 0) *params.nonfinite = 1;
  }
}

template void residual_layer_norm_cpu(const ResidualLayerNorm<float>&);
template void residual_layer_norm_cpu(const ResidualLayerNorm<double>&);
template void residual_layer_norm_backward_cpu(const ResidualLayerNormBackward<float>&);
template void residual_layer_norm_backward_cpu(const ResidualLayerNormBackward<double>&);

void scale_gradient_cpu(const GradientScaling& params) {
  advise_huge(params.out, params.out_format, params.n);
  parallel_for(0, params.n, kGrain, [&](int64_t begin, int64_t end) {
    simd([=, scale = *params.scale]() DF_INLINE_LAMBDA {
      with_format(params.out_format, [&](auto element) DF_INLINE_LAMBDA {
        using S = decltype(element);
        const auto* in = static_cast<const float*>(params.in);
        auto* out = static_cast<S*>(params.out);
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) out[i] = narrow<S>(in[i] * scale);
      });
    });
  });
}

void unscale_gradient_cpu(const GradientScaling& params) {
  advise_huge(params.out, params.out_format, params.n);
  parallel_for(0, params.n, kGrain, [&](int64_t begin, int64_t end) {
    simd([=, scale = *params.scale]() DF_INLINE_LAMBDA {
      with_format(params.in_format, [&](auto element) DF_INLINE_LAMBDA {
        using S = decltype(element);
        const auto* in = static_cast<const S*>(params.in);
        auto* out = static_cast<float*>(params.out);
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) {
          const float x = widen(in[i]);
          out[i] = (is_finite(x) ? x : 0.0f) / scale;
        }
      });
    });
  });
}

void update_scales_cpu(const ScaleUpdate& params) {
  for (int64_t i = 0; i < params.n; ++i) {
    const ScaleState next =
        next_scale({params.scale[i], params.since_division[i]}, params.nonfinite[i] != 0, params.replicas);
    params.scale[i] = next.scale;
    params.since_division[i] = next.since_division;
    params.nonfinite[i] = 0;
  }
}

}  // namespace dalle_fast
