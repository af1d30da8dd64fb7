// One pass is enough, since sum_k y dy = dz . z. A block owns 64 codes and 128 channels (64 in float64) of the
// codebook's gradient, which stays in registers while the block goes through its share of the pixels, 64 at a time: dy
// is the product of its rows of the codebook with dz; y comes from the statistics and noise drawn again; both give the
// gradient of the logits, and the product of y and dz is added to that of the codebook. Shares are fixed by the shape;
// a last kernel adds them in order. If one block cannot own all channels, the blocks of the first channels make dy from
// all of them in turn.
//
// 16-bit tensors use tensor cores; these have too few bits for float32, which takes the FP32 units and eight times as
// long.
#include "cuda/intrinsics.h"
#include "gumbel/cuda_product_mma.h"

namespace dalle_fast {

using namespace gumbel;

namespace {

constexpr int64_t kEnoughBlocks = 264;  // two on each multiprocessor of a large GPU

// Number of blocks that own the same codes and channels, each for its share of the pixels.
int64_t splits_of(const GumbelShape& s, int64_t channels, int64_t block_channels) {
  const int64_t blocks = tiles_of(s.codes, kTileCodes) * tiles_of(channels, block_channels);
  const int64_t tiles = s.batch * tiles_of(s.pixels, kTilePixels), wanted = kEnoughBlocks / blocks;
  return wanted < 1 ? 1 : wanted < tiles ? wanted : tiles;
}

// The pixels of a tile, in shared memory: quads lie side by side, as lanes read them.
template <typename T>
struct TileStats {
  Quad<T> stats[kGumbelStats][kTileQuads], dots[kTileQuads];
  Quad<int> codes[kTileQuads];
};

// The phases of the backward on a tile, for the codes of a thread's slice at its quad.
template <typename S, bool short_cut>
class Backward {
 public:
  using T = Arithmetic<S>;
  using Product = BackwardProduct<S>;

  DF_DEVICE Backward(const QuantizeBackward<S>& p, const TilePlace& place, TileStats<T>& pixels)
      : p_(p),
        s_(p.shape),
        dz_shape_(p.shape),
        pixels_(pixels),
        inverse_tau_(static_cast<T>(1 / p.shape.tau)),
        log_codes_(static_cast<T>(log(static_cast<double>(p.shape.codes)))),
        codes_(static_cast<int>(p.shape.codes)),
        first_code_(blockIdx.x * kTileCodes),
        place_(place),
        dz_place_(p.dz_strides) {
    dz_shape_.codes = p.channels;
  }

  // The statistics of a tile: one thread per pixel.
  DF_DEVICE void load_pixels(int64_t image, int64_t first_pixel) const {
    if (threadIdx.x >= kTilePixels || first_pixel + threadIdx.x >= s_.pixels) return;
    const int64_t pixel = first_pixel + threadIdx.x, index = image * s_.pixels + pixel;
    const int quad = threadIdx.x / kQuad, i = threadIdx.x % kQuad;
#pragma unroll
    for (int stat = 0; stat < kGumbelStats; ++stat) {
      pixels_.stats[stat][quad].at[i] = p_.stats[(image * kGumbelStats + stat) * s_.pixels + pixel];
    }
    pixels_.dots[quad].at[i] = p_.workspace[index];
    pixels_.codes[quad].at[i] = static_cast<int>(p_.codes[index]);
  }

  // dz of a tile, for as many channels as a block owns, from first_channel on.
  DF_DEVICE void load_dz(int64_t image, int64_t first_pixel, int64_t first_channel, Product& product) const {
    const QuadGrid<const S> grid(p_.grad_z, dz_shape_, p_.dz_strides, image);
    for (int c = dz_place_.slice; c < Product::kChannels; c += kTileSlices) {
      Quad<T> dz{};
      if (first_channel + c < p_.channels) dz = grid.load(first_channel + c, first_pixel + dz_place_.quad * kQuad);
      product.set_dz(c, dz_place_.quad, dz);
    }
  }

  // From dy: the gradient of the logits, written if `stores`, and the sample y for the gradient of the codebook.
  DF_DEVICE void differentiate(int64_t image, int64_t first_pixel, bool stores, Product& product) const {
    const int64_t my_pixel = first_pixel + place_.quad * kQuad;
    const QuadGrid<const S> logits_grid(p_.logits, s_, p_.strides, image);
    const QuadGrid<S> grad_grid(p_.grad_logits, s_, p_.strides, image);
    const QuadNoise noise(s_, image);
    const T grad_kl = p_.grad_kl[image];
#pragma unroll
    for (int c = 0; c < kThreadCodes; ++c) {
      const int code = first_code_ + place_.slice + c * kTileSlices;
      const Quad<T> dy = product.dy(c);
      Quad<T> sample{}, grad{};
      if (code < codes_) {
        const Quad<T> logits = logits_grid.load(code, my_pixel);
        ForwardStats<T> stats[kQuad];
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          stats[i] = {pixels_.stats[kNoisyReference][place_.quad].at[i], pixels_.stats[kNoisyLogSum][place_.quad].at[i],
                      pixels_.stats[kPlainLse][place_.quad].at[i], pixels_.stats[kPixelKl][place_.quad].at[i]};
        }
        const Quad<T> dots = pixels_.dots[place_.quad],
                      y = soft_quad<short_cut>(noise, logits, code, my_pixel, stats, inverse_tau_);
        const Quad<int> hard_code = pixels_.codes[place_.quad];
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          if (my_pixel + i < s_.pixels) sample.at[i] = p_.hard ? T(hard_code.at[i] == code) : y.at[i];
          grad.at[i] = y.at[i] * inverse_tau_ * (dy.at[i] - dots.at[i]) +
                       grad_kl * stats[i].kl_gradient(logits.at[i], log_codes_);
        }
        if (stores) grad_grid.store(code, my_pixel, grad);
      }
      product.set_y(place_.slice + c * kTileSlices, place_.quad, sample);
    }
  }

  // The block's part of the codebook's gradient.
  DF_DEVICE void store(const Product& product, int64_t first_channel) const {
    T* const part = p_.workspace + s_.batch * s_.pixels + blockIdx.z * s_.codes * p_.channels;
    product.for_each([&](int code_of_tile, int channel_of_block, T sum) {
      const int64_t code = first_code_ + code_of_tile, channel = first_channel + channel_of_block;
      if (code < codes_ && channel < p_.channels) part[code * p_.channels + channel] = sum;
    });
  }

 private:
  const QuantizeBackward<S>& p_;
  const GumbelShape& s_;
  GumbelShape dz_shape_;
  TileStats<T>& pixels_;
  const T inverse_tau_, log_codes_;
  const int codes_, first_code_;
  const TilePlace place_, dz_place_;
};

template <typename S, bool short_cut>
__global__ void __launch_bounds__(kProductThreads, kProductBlocks<S>) backward_kernel(QuantizeBackward<S> p) {
  using T = Arithmetic<S>;
  using Product = BackwardProduct<S>;
  const int codes = static_cast<int>(p.shape.codes), first_code = blockIdx.x * kTileCodes;
  const int64_t image_tiles = tiles_of(p.shape.pixels, kTilePixels), tiles = p.shape.batch * image_tiles;
  const int64_t first_channel = int64_t{blockIdx.y} * Product::kChannels;

  __shared__ TileStats<T> pixels;
  DF_SHARED(shared);
  const TilePlace place(p.strides);
  const Backward<S, short_cut> backward(p, place, pixels);
  Product product(shared, place);
  // The block's own channels last: their dz stays for the codebook's gradient.
  const bool makes_dy = blockIdx.y == 0;
  const int64_t channel_tiles = tiles_of(p.channels, Product::kChannels);
  const int64_t last_channel = makes_dy ? (channel_tiles - 1) * Product::kChannels : first_channel;
  if (makes_dy) product.load_codebook(p.codebook, codes, p.channels, first_code, 0);
  const int64_t end = tiles * (blockIdx.z + 1) / gridDim.z;
  for (int64_t tile = tiles * blockIdx.z / gridDim.z; tile < end; ++tile) {
    const int64_t image = tile / image_tiles, first_pixel = tile % image_tiles * kTilePixels;
    backward.load_pixels(image, first_pixel);
    product.clear_dy();
    for (int64_t channel = last_channel; channel >= first_channel; channel -= Product::kChannels) {
      __syncthreads();
      backward.load_dz(image, first_pixel, channel, product);
      if (makes_dy && channel_tiles > 1) product.load_codebook(p.codebook, codes, p.channels, first_code, channel);
      __syncthreads();
      if (makes_dy) product.add_dy();
    }
    product.share_dy();
    backward.differentiate(image, first_pixel, makes_dy, product);
    __syncthreads();
    product.add_gradient();
  }
  backward.store(product, first_channel);
}

// dz . z of each pixel.
template <typename S>
__global__ void __launch_bounds__(kProductThreads) dots_kernel(QuantizeBackward<S> p) {
  using T = Arithmetic<S>;
  const GumbelShape& s = p.shape;
  const int64_t index = int64_t{blockIdx.x} * kProductThreads + threadIdx.x;
  if (index >= s.batch * s.pixels) return;
  const int64_t image = index / s.pixels, pixel = index % s.pixels;
  const S* const dz = p.grad_z + image * p.channels * s.pixels + pixel * p.dz_strides.pixel;
  T sum = 0;
  for (int64_t c = 0; c < p.channels; ++c) {
    sum += widen(dz[c * p.dz_strides.code]) * p.soft[index * p.channels + c];
  }
  p.workspace[index] = sum;
}

template <typename S>
__global__ void __launch_bounds__(kProductThreads) add_parts_kernel(QuantizeBackward<S> p, int64_t splits) {
  using T = Arithmetic<S>;
  const int64_t n = p.shape.codes * p.channels, i = int64_t{blockIdx.x} * kProductThreads + threadIdx.x;
  if (i >= n) return;
  const T* const parts = p.workspace + p.shape.batch * p.shape.pixels;
  T sum = 0;
  for (int64_t split = 0; split < splits; ++split) sum += parts[split * n + i];
  p.grad_codebook[i] = narrow<S>(sum);
}

}  // namespace

template <typename S>
int64_t gumbel_quantize_workspace(const GumbelShape& s, int64_t channels) {
  return s.batch * s.pixels + splits_of(s, channels, BackwardProduct<S>::kChannels) * s.codes * channels;
}

template <typename S>
cudaError_t launch_gumbel_quantize_backward(const QuantizeBackward<S>& params, cudaStream_t stream) {
  using Product = BackwardProduct<S>;
  const GumbelShape& s = params.shape;
  const int64_t splits = splits_of(s, params.channels, Product::kChannels);
  const auto one_each = [](int64_t n) { return static_cast<unsigned>(tiles_of(n, kProductThreads)); };
  cudaError_t error = launch(dots_kernel<S>, one_each(s.batch * s.pixels), kProductThreads, 0, stream, params);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(tiles_of(s.codes, kTileCodes)),
                  static_cast<unsigned>(tiles_of(params.channels, Product::kChannels)), static_cast<unsigned>(splits));
  error = with_short_cut(s, [&](auto short_cut) {
    return launch(backward_kernel<S, short_cut.value>, grid, kProductThreads, Product::kSharedBytes, stream, params);
  });
  if (error != cudaSuccess) return error;
  return launch(add_parts_kernel<S>, one_each(s.codes * params.channels), kProductThreads, 0, stream, params, splits);
}

template int64_t gumbel_quantize_workspace<float>(const GumbelShape&, int64_t);
template int64_t gumbel_quantize_workspace<double>(const GumbelShape&, int64_t);
template int64_t gumbel_quantize_workspace<BFloat16>(const GumbelShape&, int64_t);
template int64_t gumbel_quantize_workspace<Half>(const GumbelShape&, int64_t);
template cudaError_t launch_gumbel_quantize_backward(const QuantizeBackward<float>&, cudaStream_t);
template cudaError_t launch_gumbel_quantize_backward(const QuantizeBackward<double>&, cudaStream_t);
template cudaError_t launch_gumbel_quantize_backward(const QuantizeBackward<BFloat16>&, cudaStream_t);
template cudaError_t launch_gumbel_quantize_backward(const QuantizeBackward<Half>&, cudaStream_t);

}  // namespace dalle_fast
