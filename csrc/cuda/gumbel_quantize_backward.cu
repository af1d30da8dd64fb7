// Since sum_k y dy = dz . z, one pass does. A block owns 64 codes and 128 channels (64 in float64) of the codebook's
// gradient, which stays in registers while it goes through its share of the pixels, 64 at a time: dy is the product of
// its rows of the codebook with dz; y is made from the statistics and noise drawn again; both give the gradient of the
// logits, and y times dz adds to that of the codebook. Shares are fixed by the shape; a last kernel adds them in order.
// With more channels than one block owns, those of the first ones make dy from all channels in turn.
//
// The products run on the FP32 units: tensor cores have too few bits for float32. bfloat16 takes this way, too.
#include "cuda/gumbel_tile.h"

namespace dalle_fast {
namespace {

constexpr int64_t kEnoughBlocks = 264;  // two on each multiprocessor of a large GPU

// Blocks that share the codes and channels of one, each with its part of the pixels.
int64_t splits_of(const GumbelShape& s, int64_t channels, int64_t block_channels) {
  const int64_t blocks = tiles_of(s.codes, kTileCodes) * tiles_of(channels, block_channels);
  const int64_t tiles = s.batch * tiles_of(s.pixels, kTilePixels), wanted = kEnoughBlocks / blocks;
  return wanted < 1 ? 1 : wanted < tiles ? wanted : tiles;
}

// Rows of a block's channels in shared memory. Groups of four channels trade places by `key`, which differs between the
// rows that lanes read together: no bank conflicts.
template <typename T>
struct ChannelRows {
  T* data;

  DF_DEVICE T* at(int row, int key, int channel) const {
    return data + row * kTileChannels<T> + ((channel / kQuad) ^ (key % 8)) * kQuad + channel % kQuad;
  }
};

template <typename S>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<S>) backward_kernel(QuantizeBackward<S> p) {
  using T = Arithmetic<S>;
  using Own = OwnChannels<T>;
  constexpr int kChannels = kTileChannels<T>;
  const GumbelShape& s = p.shape;
  const int codes = static_cast<int>(s.codes);
  const T inverse_tau = static_cast<T>(1 / s.tau), log_codes = static_cast<T>(log(static_cast<double>(s.codes)));
  const int64_t image_tiles = tiles_of(s.pixels, kTilePixels), tiles = s.batch * image_tiles;
  const int first_code = blockIdx.x * kTileCodes;
  const int64_t first_channel = int64_t{blockIdx.y} * kChannels;
  const TilePlace place(p.strides), dz_place(p.dz_strides);
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp * kOwnRows;  // in the codebook's gradient
  GumbelShape dz_shape = s;
  dz_shape.codes = p.channels;

  DF_SHARED(shared);
  T* const y_tile = reinterpret_cast<T*>(shared);  // [kTileCodes][kCodePitch]
  const ChannelRows<T> codebook{y_tile + kTileCodes * kCodePitch}, dz{codebook.data + kTileCodes * kChannels};

  const auto load_codebook = [&](int64_t channels_from) {
    const int channel = threadIdx.x % kChannels;
    const S* const from = p.codebook + first_code * p.channels + channels_from + channel;
    for (int c = threadIdx.x / kChannels; c < kTileCodes; c += kTileThreads / kChannels) {
      const bool inside = first_code + c < codes && channels_from + channel < p.channels;
      *codebook.at(c, c, channel) = inside ? load_element(from[c * p.channels]) : T(0);
    }
  };
  const auto load_dz = [&](int64_t image, int64_t first_pixel, int64_t channels_from) {
    const QuadGrid<const S> grid(p.grad_z, dz_shape, p.dz_strides, image);
    for (int c = dz_place.slice; c < kChannels; c += kTileSlices) {
      Quad<T> quad{};
      if (channels_from + c < p.channels) quad = grid.load(channels_from + c, first_pixel + dz_place.quad * kQuad);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) *dz.at(dz_place.quad * kQuad + i, dz_place.quad, c) = quad.at[i];
    }
  };

  Own gradient[kOwnRows] = {};
  const bool makes_dy = blockIdx.y == 0, one_block = p.channels <= kChannels;
  if (makes_dy && one_block) load_codebook(0);
  const int64_t end = tiles * (blockIdx.z + 1) / gridDim.z;
  for (int64_t tile = tiles * blockIdx.z / gridDim.z; tile < end; ++tile) {
    const int64_t image = tile / image_tiles, first_pixel = tile % image_tiles * kTilePixels;
    const int64_t my_pixel = first_pixel + place.quad * kQuad;
    Quad<T> dy[kOwnCodes] = {};
    // The block's own channels last: their dz stays for the codebook's gradient.
    for (int64_t from = makes_dy ? (tiles_of(p.channels, kChannels) - 1) * kChannels : first_channel;
         from >= first_channel; from -= kChannels) {
      __syncthreads();
      load_dz(image, first_pixel, from);
      if (!one_block && makes_dy) load_codebook(from);
      __syncthreads();
      if (!makes_dy) continue;
      for (int channel = 0; channel < kChannels; channel += kQuad) {
        Quad<T> w[kOwnCodes];
#pragma unroll
        for (int c = 0; c < kOwnCodes; ++c) {
          const int code = place.slice + c * kTileSlices;
          w[c] = *reinterpret_cast<const Quad<T>*>(codebook.at(code, code, channel));
        }
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          const auto g = *reinterpret_cast<const Quad<T>*>(dz.at(place.quad * kQuad + i, place.quad, channel));
#pragma unroll
          for (int c = 0; c < kOwnCodes; ++c) {
#pragma unroll
            for (int j = 0; j < kQuad; ++j) dy[c].at[i] += w[c].at[j] * g.at[j];
          }
        }
      }
    }

    const QuadGrid<const S> logits_grid(p.logits, s, p.strides, image);
    const QuadGrid<S> grad_grid(p.grad_logits, s, p.strides, image);
    const QuadNoise noise(s, image);
    const T grad_kl = p.grad_kl[image];
#pragma unroll
    for (int c = 0; c < kOwnCodes; ++c) {
      const int code = first_code + place.slice + c * kTileSlices;
      Quad<T> sample{}, grad{};
      if (code < codes) {
        const Quad<T> logits = logits_grid.load(code, my_pixel);
        const Quad<T> noisy = noise.add_to(logits, code, my_pixel);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          if (my_pixel + i >= s.pixels) continue;
          const int64_t index = image * s.pixels + my_pixel + i;
          const PixelStats<T> stats = load_stats(s, p.stats, image, my_pixel + i);
          const T y = stats.soft(noisy.at[i], inverse_tau);
          sample.at[i] = p.hard ? T(p.codes[index] == code) : y;
          grad.at[i] = y * inverse_tau * (dy[c].at[i] - p.workspace[index]) +
                       grad_kl * stats.kl_gradient(logits.at[i], log_codes);
        }
        if (makes_dy) grad_grid.store(code, my_pixel, grad);
      }
      T* const code_y = y_tile + (place.slice + c * kTileSlices) * kCodePitch;
      reinterpret_cast<Quad<T>*>(code_y)[place.quad] = sample;
    }
    __syncthreads();

    for (int pixel = 0; pixel < kTilePixels; pixel += kQuad) {
      Own g[kQuad];
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        g[i] = *reinterpret_cast<const Own*>(dz.at(pixel + i, pixel / kQuad, lane * Own::kCount));
      }
#pragma unroll
      for (int r = 0; r < kOwnRows; ++r) {
        const auto y = *reinterpret_cast<const Quad<T>*>(y_tile + (row + r) * kCodePitch + pixel);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
#pragma unroll
          for (int c = 0; c < Own::kCount; ++c) gradient[r].at[c] += y.at[i] * g[i].at[c];
        }
      }
    }
  }

  T* const part = p.workspace + s.batch * s.pixels + blockIdx.z * s.codes * p.channels;
  for (int r = 0; r < kOwnRows; ++r) {
#pragma unroll
    for (int c = 0; c < Own::kCount; ++c) {
      const int64_t code = first_code + row + r, channel = first_channel + lane * Own::kCount + c;
      if (code < codes && channel < p.channels) part[code * p.channels + channel] = gradient[r].at[c];
    }
  }
}

// dz . z of each pixel.
template <typename S>
__global__ void __launch_bounds__(kTileThreads) dots_kernel(QuantizeBackward<S> p) {
  using T = Arithmetic<S>;
  const GumbelShape& s = p.shape;
  const int64_t index = int64_t{blockIdx.x} * kTileThreads + threadIdx.x;
  if (index >= s.batch * s.pixels) return;
  const int64_t image = index / s.pixels, pixel = index % s.pixels;
  const S* const dz = p.grad_z + image * p.channels * s.pixels + pixel * p.dz_strides.pixel;
  T sum = 0;
  for (int64_t c = 0; c < p.channels; ++c) {
    sum += load_element(dz[c * p.dz_strides.code]) * p.soft[index * p.channels + c];
  }
  p.workspace[index] = sum;
}

template <typename S>
__global__ void __launch_bounds__(kTileThreads) add_parts_kernel(QuantizeBackward<S> p, int64_t splits) {
  using T = Arithmetic<S>;
  const int64_t n = p.shape.codes * p.channels, i = int64_t{blockIdx.x} * kTileThreads + threadIdx.x;
  if (i >= n) return;
  const T* const parts = p.workspace + p.shape.batch * p.shape.pixels;
  T sum = 0;
  for (int64_t split = 0; split < splits; ++split) sum += parts[split * n + i];
  p.grad_codebook[i] = store_element<S>(sum);
}

}  // namespace

template <typename T>
int64_t gumbel_quantize_workspace(const GumbelShape& s, int64_t channels) {
  return s.batch * s.pixels + splits_of(s, channels, kTileChannels<T>) * s.codes * channels;
}

template <typename S>
cudaError_t launch_gumbel_quantize_backward(const QuantizeBackward<S>& params, cudaStream_t stream) {
  using T = Arithmetic<S>;
  constexpr size_t kShared = sizeof(T) * (kTileCodes * kCodePitch + (kTileCodes + kTilePixels) * kTileChannels<T>);
  const GumbelShape& s = params.shape;
  const int64_t splits = splits_of(s, params.channels, kTileChannels<T>);
  const auto one_each = [](int64_t n) { return static_cast<unsigned>(tiles_of(n, kTileThreads)); };
  cudaError_t error = launch(dots_kernel<S>, one_each(s.batch * s.pixels), kTileThreads, 0, stream, params);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(tiles_of(s.codes, kTileCodes)),
                  static_cast<unsigned>(tiles_of(params.channels, kTileChannels<T>)), static_cast<unsigned>(splits));
  error = launch(backward_kernel<S>, grid, kTileThreads, kShared, stream, params);
  if (error != cudaSuccess) return error;
  return launch(add_parts_kernel<S>, one_each(s.codes * params.channels), kTileThreads, 0, stream, params, splits);
}

template int64_t gumbel_quantize_workspace<float>(const GumbelShape&, int64_t);
template int64_t gumbel_quantize_workspace<double>(const GumbelShape&, int64_t);
template cudaError_t launch_gumbel_quantize_backward(const QuantizeBackward<float>&, cudaStream_t);
template cudaError_t launch_gumbel_quantize_backward(const QuantizeBackward<double>&, cudaStream_t);
template cudaError_t launch_gumbel_quantize_backward(const QuantizeBackward<uint16_t>&, cudaStream_t);

}  // namespace dalle_fast
