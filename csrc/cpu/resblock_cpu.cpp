// One thread takes whole rows: a row is read from memory once and stays in the cache for the two passes of its mean and
// variance. The gradients of weight and bias are sums over rows: each of a fixed number of row blocks writes its own
// partial sum, and the partials are added in order, so that the result does not depend on the number of threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "convert.h"
#include "resblock.h"
#include "simd.h"

namespace dalle_fast {
namespace {

using torch::stable::parallel_for;

constexpr int kLanes = 16;  // partial sums of a reduction, so that it vectorises without reordering by the compiler
constexpr int64_t kGrain = 32768;   // elements worth a thread
constexpr int64_t kMaxBlocks = 32;  // of rows

int64_t row_grain(int64_t width) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)); }

template <typename T, typename Term>
DF_ALWAYS_INLINE T sum_of(int64_t n, const Term& term) {
  T lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += term(i + l);
  }
  for (; i < n; ++i) lanes[i % kLanes] += term(i);
  T total = 0;
  for (const T lane : lanes) total += lane;
  return total;
}

template <typename T>
DF_ALWAYS_INLINE void forward_rows_body(const ResidualLayerNorm<T>& p, int64_t begin, int64_t end, T* buffer) {
  const int64_t width = p.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = p.x + row * width;
    T* total = p.total + row * width;
    load_row(p.branch, p.branch_format, row * width, width, buffer);
    for (int64_t i = 0; i < width; ++i) total[i] = x[i] + buffer[i];
    const T mean = sum_of<T>(width, [&](int64_t i) { return total[i]; }) / width;
    const T variance = sum_of<T>(width, [&](int64_t i) { return (total[i] - mean) * (total[i] - mean); }) / width;
    const T rstd = 1 / std::sqrt(variance + static_cast<T>(p.eps));
    for (int64_t i = 0; i < width; ++i) buffer[i] = (total[i] - mean) * rstd * p.weight[i] + p.bias[i];
    store_row(buffer, width, p.normed, p.normed_format, row * width);
    p.mean[row] = mean;
    p.rstd[row] = rstd;
  }
}

void forward_rows(const ResidualLayerNorm<float>& p, int64_t begin, int64_t end, float* buffer) {
  simd([=]() DF_INLINE_LAMBDA { forward_rows_body(p, begin, end, buffer); });
}

void forward_rows(const ResidualLayerNorm<double>& p, int64_t begin, int64_t end, double* buffer) {
  simd([=]() DF_INLINE_LAMBDA { forward_rows_body(p, begin, end, buffer); });
}

// grad_weight and grad_bias: this block's partial sums, zero on entry. buffer: [2, width].
template <typename T>
DF_ALWAYS_INLINE void backward_rows_body(const ResidualLayerNormBackward<T>& p, int64_t begin, int64_t end, T* buffer,
                                         T* grad_weight, T* grad_bias) {
  const int64_t width = p.width;
  T *normal = buffer, *grad = buffer + width;  // the normalised row before weight and bias; its gradient
  for (int64_t row = begin; row < end; ++row) {
    const T* total = p.total + row * width;
    const T* grad_total = p.grad_total + row * width;
    T* grad_x = p.grad_x + row * width;
    const T mean = p.mean[row], rstd = p.rstd[row];
    load_row(p.grad_normed, p.normed_format, row * width, width, grad);
    for (int64_t i = 0; i < width; ++i) {
      normal[i] = (total[i] - mean) * rstd;
      grad_weight[i] += grad[i] * normal[i];
      grad_bias[i] += grad[i];
      grad[i] *= p.weight[i];
    }
    const T grad_mean = sum_of<T>(width, [&](int64_t i) { return grad[i]; }) / width;
    const T grad_normal = sum_of<T>(width, [&](int64_t i) { return grad[i] * normal[i]; }) / width;
    for (int64_t i = 0; i < width; ++i) {
      grad_x[i] = grad_total[i] + rstd * (grad[i] - grad_mean - normal[i] * grad_normal);
    }
  }
}

void backward_rows(const ResidualLayerNormBackward<float>& p, int64_t begin, int64_t end, float* buffer,
                   float* grad_weight, float* grad_bias) {
  simd([=]() DF_INLINE_LAMBDA { backward_rows_body(p, begin, end, buffer, grad_weight, grad_bias); });
}

void backward_rows(const ResidualLayerNormBackward<double>& p, int64_t begin, int64_t end, double* buffer,
                   double* grad_weight, double* grad_bias) {
  simd([=]() DF_INLINE_LAMBDA { backward_rows_body(p, begin, end, buffer, grad_weight, grad_bias); });
}

void scale_row(const float* row, float scale, int64_t n, float* out) {
  simd([=]() DF_INLINE_LAMBDA {
    for (int64_t i = 0; i < n; ++i) out[i] = row[i] * scale;
  });
}

void unscale_row(float* row, float scale, int64_t n) {
  simd([=]() DF_INLINE_LAMBDA {
    for (int64_t i = 0; i < n; ++i)
      row[i] = (std::fabs(row[i]) <= std::numeric_limits<float>::max() ? row[i] : 0.0f) / scale;
  });
}

// Calls body(first, n, buffer) for pieces of at most kPiece elements.
template <typename Body>
void for_each_piece(int64_t n, const Body& body) {
  constexpr int64_t kPiece = 4096;
  parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    float buffer[kPiece];
    for (int64_t first = begin; first < end; first += kPiece) body(first, std::min(kPiece, end - first), buffer);
  });
}

}  // namespace

template <typename T>
void residual_layer_norm_cpu(const ResidualLayerNorm<T>& params) {
  parallel_for(0, params.rows, row_grain(params.width), [&](int64_t begin, int64_t end) {
    std::vector<T> buffer(params.width);
    forward_rows(params, begin, end, buffer.data());
  });
}

template <typename T>
void residual_layer_norm_backward_cpu(const ResidualLayerNormBackward<T>& params) {
  const int64_t width = params.width;
  const int64_t block_rows = std::max(row_grain(width), (params.rows + kMaxBlocks - 1) / kMaxBlocks);
  const int64_t blocks = (params.rows + block_rows - 1) / block_rows;
  std::vector<T> partials(blocks * 2 * width);  // [blocks, weight and bias, width]
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> buffer(2 * width);
    for (int64_t block = begin; block < end; ++block) {
      T* partial = partials.data() + block * 2 * width;
      backward_rows(params, block * block_rows, std::min(params.rows, (block + 1) * block_rows), buffer.data(), partial,
                    partial + width);
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
  }
}

template void residual_layer_norm_cpu(const ResidualLayerNorm<float>&);
template void residual_layer_norm_cpu(const ResidualLayerNorm<double>&);
template void residual_layer_norm_backward_cpu(const ResidualLayerNormBackward<float>&);
template void residual_layer_norm_backward_cpu(const ResidualLayerNormBackward<double>&);

void scale_gradient_cpu(const float* in, float scale, int64_t n, void* out, Format out_format) {
  for_each_piece(n, [&](int64_t first, int64_t count, float* buffer) {
    scale_row(in + first, scale, count, buffer);
    store_row(buffer, count, out, out_format, first);
  });
}

void unscale_gradient_cpu(const void* in, Format in_format, float scale, int64_t n, float* out) {
  for_each_piece(n, [&](int64_t first, int64_t count, float*) {
    load_row(in, in_format, first, count, out + first);
    unscale_row(out + first, scale, count);
  });
}

}  // namespace dalle_fast
