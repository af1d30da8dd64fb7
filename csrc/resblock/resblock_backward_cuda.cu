// residual_layer_norm_backward, per-resblock scaling included: one read of both gradients and of the sum, one write of
// the stream's gradient and of the scaled one, 16 bytes an element with 16-bit resblocks; bound by memory. Rows as in
// resblock_rows.h. Inf and NaN become 0 as they are read, before the sums over the row, which they would spoil.
//
// The gradients of weight and bias are sums over rows. A thread has the same columns in every row of its block, so it
// keeps their sums in registers and writes them once, to partials [blocks, 2, width]; a second kernel adds these in
// order. Rows too wide for registers keep the sums in partials all along.
#include "cuda/intrinsics.h"
#include "resblock/cuda_rows.h"
#include "resblock/resblock.h"

namespace dalle_fast {
namespace {

template <typename Layout, typename T>
__global__ void __launch_bounds__(kMostThreads) backward_kernel(ResidualLayerNormBackward<T> p) {
  constexpr int kVec = Layout::kVec;
  __shared__ T parts[2][2][kMostWarps];
  const T inverse_width = T(1) / p.width;
  const bool filter = p.nonfinite != nullptr;
  const T unscale = p.scale_in == nullptr ? T(1) : 1 / static_cast<T>(*p.scale_in);
  const T scale_out = p.scale_out == nullptr ? T(1) : static_cast<T>(*p.scale_out);
  T* const weight_partials = p.partials + static_cast<int64_t>(blockIdx.x) * 2 * p.width;
  T* const bias_partials = weight_partials + p.width;
  Piece<T, Layout> grad_weight = {}, grad_bias = {};
  bool nonfinite = false;
  int parity = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, parity ^= 1) {
    const int64_t start = row * p.width;
    const T mean = p.mean[row], rstd = p.rstd[row];
    Piece<T, Layout> normal, grad, grad_total;  // grad: of normed, then of normal

    const auto read = [&](int64_t strip) {
      for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t i) { load_chunk(p.total + start + i, normal[c]); });
      with_format<T>(p.normed_format, [&](auto element) {
        const auto* grad_normed = static_cast<const decltype(element)*>(p.grad_normed) + start;
        for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t i) { load_chunk(grad_normed + i, grad[c]); });
      });
      for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          if (filter && !is_finite(grad[c][v])) {
            grad[c][v] = 0;
            nonfinite = true;
          }
          grad[c][v] *= unscale;
          normal[c][v] = (normal[c][v] - mean) * rstd;
        }
      });
    };
    const auto read_stream = [&](int64_t strip) {
      for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t i) {
        if (p.grad_total != nullptr) {
          load_chunk(p.grad_total + start + i, grad_total[c]);
        } else {
#pragma unroll
          for (int v = 0; v < kVec; ++v) grad_total[c][v] = 0;
        }
      });
    };
    const auto apply_weight = [&](int64_t strip) {
      for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t i) {
        T weight[kVec];
        load_chunk(p.weight + i, weight);
#pragma unroll
        for (int v = 0; v < kVec; ++v) grad[c][v] *= weight[v];
      });
    };

    T sums[2] = {0, 0};  // of grad and of grad * normal
    for_each_strip<Layout>(p.width, [&](int64_t strip) {
      if constexpr (Layout::kResident) read_stream(strip);
      read(strip);
      for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t i) {
        if constexpr (!Layout::kResident) {
          const bool first = row == blockIdx.x;
          grad_weight[c][0] = first ? T(0) : weight_partials[i];
          grad_bias[c][0] = first ? T(0) : bias_partials[i];
        }
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          grad_weight[c][v] += grad[c][v] * normal[c][v];
          grad_bias[c][v] += grad[c][v];
        }
        if constexpr (!Layout::kResident) {
          weight_partials[i] = grad_weight[c][0];
          bias_partials[i] = grad_bias[c][0];
        }
      });
      apply_weight(strip);
      for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          sums[0] += grad[c][v];
          sums[1] += grad[c][v] * normal[c][v];
        }
      });
    });
    sum_over_block(sums, parts[parity]);
    const T grad_mean = sums[0] * inverse_width, product_mean = sums[1] * inverse_width;

    for_each_strip<Layout>(p.width, [&](int64_t strip) {
      if constexpr (!Layout::kResident) {
        read_stream(strip);
        read(strip);
        apply_weight(strip);
      }
      for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t i) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          grad_total[c][v] += rstd * (grad[c][v] - grad_mean - normal[c][v] * product_mean);
        }
        store_chunk(grad_total[c], p.grad_x + start + i);
      });
      if (p.grad_branch == nullptr) return;
      with_format<T>(p.branch_format, [&](auto element) {
        auto* grad_branch = static_cast<decltype(element)*>(p.grad_branch) + start;
        for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t i) {
          T scaled[kVec];
#pragma unroll
          for (int v = 0; v < kVec; ++v) scaled[v] = grad_total[c][v] * scale_out;
          store_chunk(scaled, grad_branch + i);
        });
      });
    });
  }
  if constexpr (Layout::kResident) {
    for_each_chunk<Layout>(p.width, 0, [&](int c, int64_t i) {
      store_chunk(grad_weight[c], weight_partials + i);
      store_chunk(grad_bias[c], bias_partials + i);
    });
  }
  if (nonfinite) raise_flag(p.nonfinite);
}

constexpr int kColumns = 32, kSlices = 16;  // a block's columns, and the parts in which it adds up partials

template <typename T>
__global__ void __launch_bounds__(kColumns* kSlices) sum_partials_kernel(ResidualLayerNormBackward<T> p) {
  __shared__ T parts[kSlices][kColumns];
  const int lane = threadIdx.x % kColumns, slice = threadIdx.x / kColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + lane;  // of weight, then of bias
  T sum = 0;
  if (column < 2 * p.width) {
    for (int partial = slice; partial < p.partial_count; partial += kSlices) {
      sum += p.partials[partial * 2 * p.width + column];
    }
  }
  parts[slice][lane] = sum;
  __syncthreads();
  if (slice != 0 || column >= 2 * p.width) return;
  for (int other = 1; other < kSlices; ++other) sum += parts[other][lane];
  (column < p.width ? p.grad_weight[column] : p.grad_bias[column - p.width]) = sum;
}

// Calls body(Layout()).
template <typename T, typename Body>
cudaError_t with_layout(const ResidualLayerNormBackward<T>& p, const Body& body) {
  if constexpr (sizeof(T) == 4) {
    if (fits_resident<T>(p.width, {p.grad_total, p.grad_normed, p.total, p.weight, p.grad_x, p.grad_branch})) {
      return body(Resident());
    }
  }
  return body(Strips());
}

}  // namespace

template <typename T>
cudaError_t count_partials(ResidualLayerNormBackward<T>* p) {
  return with_layout(*p, [&](auto layout) {
    using Layout = decltype(layout);
    int blocks;
    const cudaError_t error = resident_blocks(backward_kernel<Layout, T>, row_threads<Layout>(p->width), 0, &blocks);
    if (error == cudaSuccess) p->partial_count = p->rows < blocks ? static_cast<int>(p->rows) : blocks;
    return error;
  });
}

template <typename T>
cudaError_t launch_residual_layer_norm_backward(const ResidualLayerNormBackward<T>& p, cudaStream_t stream) {
  const cudaError_t error = with_layout(p, [&](auto layout) {
    using Layout = decltype(layout);
    return launch(backward_kernel<Layout, T>, p.partial_count, row_threads<Layout>(p.width), 0, stream, p);
  });
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>((2 * p.width + kColumns - 1) / kColumns);
  return launch(sum_partials_kernel<T>, blocks, kColumns * kSlices, 0, stream, p);
}

template cudaError_t count_partials(ResidualLayerNormBackward<float>*);
template cudaError_t count_partials(ResidualLayerNormBackward<double>*);
template cudaError_t launch_residual_layer_norm_backward(const ResidualLayerNormBackward<float>&, cudaStream_t);
template cudaError_t launch_residual_layer_norm_backward(const ResidualLayerNormBackward<double>&, cudaStream_t);

}  // namespace dalle_fast
