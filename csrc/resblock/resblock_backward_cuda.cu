// residual_layer_norm_backward, per-resblock scaling included: one read of both gradients and of the sum, one write of
// the stream's gradient and of the scaled one, 16 bytes per element with 16-bit resblocks; bound by memory. Rows as in
// cuda_rows.h. Inf and NaN become 0 as they are read, before the sums over the row, which they would spoil.
//
// The gradients of weight and bias are sums over rows. A thread has the same columns in every row of its block, so it
// keeps their sums in registers and writes them once, to partials [blocks, 2, width]; a second kernel adds these in
// order. Rows too wide for registers keep the sums in partials all along.
#include "cuda/intrinsics.h"
#include "resblock/cuda_rows.h"
#include "resblock/resblock.h"

namespace dalle_fast {

using namespace resblock;

namespace {

// The block's sums over its rows, [2, width]: the gradients of weight and bias.
template <typename T>
DF_DEVICE T* block_partials(const ResidualLayerNormBackward<T>& p) {
  return p.partials + static_cast<int64_t>(blockIdx.x) * 2 * p.width;
}

// The phases of the backward on one row. Each works on the thread's chunks, which the kernel holds: `normal`, the
// normalised row, and `grad`, the gradient of normed, from apply_weight() on that of `normal`. Members are no arrays:
// the compiler keeps an object with an array that a loop indexes out of registers until it has unrolled that loop.
template <typename Layout, typename T>
struct Row {
  using Chunks = RowPiece<T, Layout>;
  static constexpr int kVec = Layout::kVec;

  const ResidualLayerNormBackward<T>& p;
  const int64_t row, start;  // start: its first element
  const T mean, rstd;

  DF_DEVICE Row(const ResidualLayerNormBackward<T>& params, int64_t index)
      : p(params), row(index), start(index * params.width), mean(params.mean[index]), rstd(params.rstd[index]) {}

  // Inf and NaN become 0 and set `nonfinite`, if p.nonfinite asks for it.
  DF_DEVICE void load(int64_t strip, T unscale, Chunks& normal, Chunks& grad, bool& nonfinite) const {
    for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t i) { load_chunk(p.total + start + i, normal[c]); });
    with_branch_format<T>(p.normed_format, [&](auto element) {
      const auto* grad_normed = static_cast<const decltype(element)*>(p.grad_normed) + start;
      for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t i) { load_chunk(grad_normed + i, grad[c]); });
    });
    for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t) {
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        if (p.nonfinite != nullptr && !is_finite(grad[c][v])) {
          grad[c][v] = 0;
          nonfinite = true;
        }
        grad[c][v] *= unscale;
        normal[c][v] = (normal[c][v] - mean) * rstd;
      }
    });
  }

  DF_DEVICE void load_stream(int64_t strip, Chunks& grad_total) const {
    for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t i) {
      if (p.grad_total != nullptr) {
        load_chunk(p.grad_total + start + i, grad_total[c]);
      } else {
#pragma unroll
        for (int v = 0; v < kVec; ++v) grad_total[c][v] = 0;
      }
    });
  }

  // Adds to the gradients of weight and bias, which strips keep in memory from the block's first row on.
  DF_DEVICE void add_to_parameters(int64_t strip, const Chunks& normal, const Chunks& grad, Chunks& grad_weight,
                                   Chunks& grad_bias) const {
    T *weight_partials = block_partials(p), *bias_partials = weight_partials + p.width;
    const bool first = row == blockIdx.x;
    for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t i) {
      if constexpr (!Layout::kResident) {
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
  }

  DF_DEVICE void apply_weight(int64_t strip, Chunks& grad) const {
    for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t i) {
      T weight[kVec];
      load_chunk(p.weight + i, weight);
#pragma unroll
      for (int v = 0; v < kVec; ++v) grad[c][v] *= weight[v];
    });
  }

  // Adds to the sums of grad and of grad * normal.
  DF_DEVICE void add_to_sums(int64_t strip, const Chunks& normal, const Chunks& grad, T (&sums)[2]) const {
    for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t) {
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        sums[0] += grad[c][v];
        sums[1] += grad[c][v] * normal[c][v];
      }
    });
  }

  // Writes the gradient of the sum to grad_x and, scaled, to grad_branch.
  DF_DEVICE void store(int64_t strip, const Chunks& normal, const Chunks& grad, T grad_mean, T product_mean,
                       T scale_out, Chunks& grad_total) const {
    for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t i) {
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        grad_total[c][v] += rstd * (grad[c][v] - grad_mean - normal[c][v] * product_mean);
      }
      store_chunk(grad_total[c], p.grad_x + start + i);
    });
    if (p.grad_branch == nullptr) return;
    with_branch_format<T>(p.branch_format, [&](auto element) {
      auto* grad_branch = static_cast<decltype(element)*>(p.grad_branch) + start;
      for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t i) {
        T scaled[kVec];
#pragma unroll
        for (int v = 0; v < kVec; ++v) scaled[v] = grad_total[c][v] * scale_out;
        store_chunk(scaled, grad_branch + i);
      });
    });
  }
};

template <typename Layout, typename T>
__global__ void __launch_bounds__(kMaxRowThreads) backward_kernel(ResidualLayerNormBackward<T> p) {
  __shared__ T parts[2][2][kMaxRowWarps];
  const T inverse_width = T(1) / p.width;
  const T unscale = p.scale_in == nullptr ? T(1) : 1 / static_cast<T>(*p.scale_in);
  const T scale_out = p.scale_out == nullptr ? T(1) : static_cast<T>(*p.scale_out);
  RowPiece<T, Layout> grad_weight = {}, grad_bias = {};
  bool nonfinite = false;
  int parity = 0;
  for (int64_t index = blockIdx.x; index < p.rows; index += gridDim.x, parity ^= 1) {
    const Row<Layout, T> row(p, index);
    RowPiece<T, Layout> normal, grad, grad_total;

    T sums[2] = {0, 0};  // of grad and of grad * normal
    for_each_strip<Layout>(p.width, [&](int64_t strip) {
      if constexpr (Layout::kResident) row.load_stream(strip, grad_total);
      row.load(strip, unscale, normal, grad, nonfinite);
      row.add_to_parameters(strip, normal, grad, grad_weight, grad_bias);
      row.apply_weight(strip, grad);
      row.add_to_sums(strip, normal, grad, sums);
    });
    sum_over_block(sums, parts[parity]);

    for_each_strip<Layout>(p.width, [&](int64_t strip) {
      if constexpr (!Layout::kResident) {
        row.load_stream(strip, grad_total);
        row.load(strip, unscale, normal, grad, nonfinite);
        row.apply_weight(strip, grad);
      }
      row.store(strip, normal, grad, sums[0] * inverse_width, sums[1] * inverse_width, scale_out, grad_total);
    });
  }
  if constexpr (Layout::kResident) {
    for_each_chunk<Layout>(p.width, 0, [&](int c, int64_t i) {
      store_chunk(grad_weight[c], block_partials(p) + i);
      store_chunk(grad_bias[c], block_partials(p) + p.width + i);
    });
  }
  if (nonfinite) raise_flag(p.nonfinite);
}

constexpr int kColumns = 32, kSlices = 16;  // columns of a block, and threads that share the partials of one

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
      return body(ResidentRows());
    }
  }
  return body(StripRows());
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
