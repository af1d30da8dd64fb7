// residual_layer_norm: one read of x and branch, one write of the sum and of its LayerNorm, 12 bytes per element with a
// 16-bit resblock; bound by memory. Rows as in cuda_rows.h. The variance is that of the differences from the mean, so
// it needs the mean first: two sums over the block for each row.
#include "resblock/cuda_rows.h"
#include "resblock/resblock.h"

namespace dalle_fast {

using namespace resblock;

namespace {

template <typename Layout, typename T>
__global__ void __launch_bounds__(kMaxRowThreads) forward_kernel(ResidualLayerNorm<T> p) {
  constexpr int kVec = Layout::kVec;
  __shared__ T sum_parts[1][kMaxRowWarps], square_parts[1][kMaxRowWarps];
  const T inverse_width = T(1) / p.width;
  const T* const totals = p.branch == nullptr ? p.x : p.total;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const int64_t start = row * p.width;
    RowPiece<T, Layout> total;

    T sum[1] = {0};
    for_each_strip<Layout>(p.width, [&](int64_t strip) {
      for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t i) { load_chunk(p.x + start + i, total[c]); });
      if (p.branch != nullptr) {
        RowPiece<T, Layout> branch;
        with_branch_format<T>(p.branch_format, [&](auto element) {
          const auto* branches = static_cast<const decltype(element)*>(p.branch) + start;
          for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t i) { load_chunk(branches + i, branch[c]); });
        });
        for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t i) {
#pragma unroll
          for (int v = 0; v < kVec; ++v) total[c][v] += branch[c][v];
          store_chunk(total[c], p.total + start + i);
        });
      }
      for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) sum[0] += total[c][v];
      });
    });
    sum_over_block(sum, sum_parts);
    const T mean = sum[0] * inverse_width;

    const auto read_again = [&](int64_t strip) {
      if constexpr (!Layout::kResident) {
        for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t i) { load_chunk(totals + start + i, total[c]); });
      }
    };
    T squares[1] = {0};
    for_each_strip<Layout>(p.width, [&](int64_t strip) {
      read_again(strip);
      for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) squares[0] += (total[c][v] - mean) * (total[c][v] - mean);
      });
    });
    sum_over_block(squares, square_parts);
    const T rstd = rsqrt(squares[0] * inverse_width + static_cast<T>(p.eps));

    for_each_strip<Layout>(p.width, [&](int64_t strip) {
      read_again(strip);
      for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t i) {
        T weight[kVec], bias[kVec];
        load_chunk(p.weight + i, weight);
        load_chunk(p.bias + i, bias);
#pragma unroll
        for (int v = 0; v < kVec; ++v) total[c][v] = (total[c][v] - mean) * rstd * weight[v] + bias[v];
      });
      with_branch_format<T>(p.normed_format, [&](auto element) {
        auto* normed = static_cast<decltype(element)*>(p.normed) + start;
        for_each_chunk<Layout>(p.width, strip, [&](int c, int64_t i) { store_chunk(total[c], normed + i); });
      });
    });
    if (threadIdx.x == 0) {
      p.mean[row] = mean;
      p.rstd[row] = rstd;
    }
  }
}

template <typename Layout, typename T>
cudaError_t launch_forward(const ResidualLayerNorm<T>& p, cudaStream_t stream) {
  const auto kernel = forward_kernel<Layout, T>;
  const int threads = row_threads<Layout>(p.width);
  int blocks;
  const cudaError_t error = resident_blocks(kernel, threads, 0, &blocks);
  if (error != cudaSuccess) return error;
  return launch(kernel, p.rows < blocks ? static_cast<int>(p.rows) : blocks, threads, 0, stream, p);
}

}  // namespace

template <typename T>
cudaError_t launch_residual_layer_norm(const ResidualLayerNorm<T>& p, cudaStream_t stream) {
  if constexpr (sizeof(T) == 4) {
    if (fits_resident<T>(p.width, {p.x, p.branch, p.weight, p.bias, p.total, p.normed})) {
      return launch_forward<ResidentRows>(p, stream);
    }
  }
  return launch_forward<StripRows>(p, stream);
}

template cudaError_t launch_residual_layer_norm(const ResidualLayerNorm<float>&, cudaStream_t);
template cudaError_t launch_residual_layer_norm(const ResidualLayerNorm<double>&, cudaStream_t);

}  // namespace dalle_fast
