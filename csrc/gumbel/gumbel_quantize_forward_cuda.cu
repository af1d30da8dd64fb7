// The relaxed sample times the codebook, as flash attention with V = W. A block owns 64 pixels and 128 channels (64 in
// float64) and goes once through all codes, 64 at a time: it draws their noise, raises the pixels' common reference to
// the largest noisy logit so far, leaves exp((noisy - reference) / tau) in shared memory, rescales what it has of z and
// adds the product with these codes' rows of the codebook. Sums for the statistics stay with the thread that owns a
// quad's codes and are merged at the end. More channels than one block owns: more blocks, which draw the noise again.
//
// 16 bits use tensor cores; these have too few bits for float32, which takes the FP32 units and eight times as long.
#include "gumbel/cuda_product_mma.h"

namespace dalle_fast {
namespace {

template <typename S, bool short_cut>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<S>) forward_kernel(QuantizeForward<S> p) {
  using T = Arithmetic<S>;
  using Product = ForwardProduct<S>;
  constexpr T kLowest = std::numeric_limits<T>::lowest(), kInfinity = std::numeric_limits<T>::infinity();
  const GumbelShape& s = p.shape;
  const int codes = static_cast<int>(s.codes);
  const T inverse_tau = static_cast<T>(1 / s.tau);
  const int64_t tiles = tiles_of(s.pixels, kTilePixels), image = blockIdx.x / tiles;
  const int64_t first_pixel = blockIdx.x % tiles * kTilePixels;
  const int64_t first_channel = int64_t{blockIdx.y} * Product::kChannels;
  const TilePlace place(p.strides);
  const int64_t my_pixel = first_pixel + place.quad * kQuad;
  const QuadGrid<const S> grid(p.logits, s, p.strides, image);
  const QuadNoise noise(s, image);

  DF_SHARED(shared);
  Product z(shared);
  auto* const parts = reinterpret_cast<PixelSums<T>*>(shared);  // [kTileSlices][kTilePixels], at the end
  __shared__ Quad<T> maxima[kTileSlices][kTileQuads];
  __shared__ Quad<T> reference[kTileQuads], factor[kTileQuads];
  __shared__ int pixel_code[kTilePixels];
  const bool leads = threadIdx.x < kTilePixels;  // one thread a pixel
  T& my_reference = reinterpret_cast<T*>(reference)[threadIdx.x % kTilePixels];
  T& my_factor = reinterpret_cast<T*>(factor)[threadIdx.x % kTilePixels];
  if (leads) my_reference = kLowest;

  constexpr PixelSums<T> kNone = PixelSums<T>::none();
  Quad<PixelSums<T>> sums{{kNone, kNone, kNone, kNone}};
  for (int first = 0; first < codes; first += kTileCodes) {
    Quad<T> logits[kOwnCodes], most;
#pragma unroll
    for (int c = 0; c < kOwnCodes; ++c) {
      const int code = first + place.slice + c * kTileSlices;
      if (code < codes) logits[c] = grid.load(code, my_pixel);
    }
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      most.at[i] = short_cut ? T(0) : kLowest;
      T plain_max = kLowest;
#pragma unroll
      for (int c = 0; c < kOwnCodes; ++c) {
        const bool inside = first + place.slice + c * kTileSlices < codes;
        if (inside && logits[c].at[i] > plain_max) plain_max = logits[c].at[i];
      }
      if (sums.at[i].plain.too_low_for(plain_max)) {
        const T below = sums.at[i].plain.raise(plain_max);
        if (short_cut) sums.at[i].best.noisy *= below;
      }
    }
#pragma unroll
    for (int c = 0; c < kOwnCodes; ++c) {
      const int code = first + place.slice + c * kTileSlices;
      constexpr T kNothing = short_cut ? T(0) : -kInfinity;
      Quad<T> noisy{{kNothing, kNothing, kNothing, kNothing}};  // in the short cut E, then its exponential
      if (code < codes) {
        noisy = short_cut ? noise.exponential<T>(code, my_pixel) : noise.add_to(logits[c], code, my_pixel);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          const T weight = sums.at[i].plain.add(logits[c].at[i]);
          if (short_cut) noisy.at[i] = ratio_of(weight, noisy.at[i]);
          if (noisy.at[i] > most.at[i]) most.at[i] = noisy.at[i];
          if (noisy.at[i] > sums.at[i].best.noisy) sums.at[i].best = {noisy.at[i], code};
        }
      }
      z.noisy(place.slice + c * kTileSlices, place.quad) = noisy;
    }
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (short_cut) most.at[i] = sums.at[i].plain.noisy_of(most.at[i]);
    }
    maxima[place.slice][place.quad] = most;
    z.load_codebook(p.codebook, codes, p.channels, first, first_channel);
    __syncthreads();
    if (leads) {
      T largest = my_reference;
#pragma unroll
      for (int slice = 0; slice < kTileSlices; ++slice) {
        const T x = reinterpret_cast<const T*>(maxima[slice])[threadIdx.x];
        largest = x > largest ? x : largest;
      }
      my_factor = exp_of((my_reference - largest) * inverse_tau);
      my_reference = largest;
    }
    __syncthreads();

    T scale[kQuad];  // of what the short cut has made
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      sums.at[i].noisy_sum *= factor[place.quad].at[i];
      scale[i] = exp_of(sums.at[i].plain.reference - reference[place.quad].at[i]);
    }
#pragma unroll
    for (int c = 0; c < kOwnCodes; ++c) {
      const int code = place.slice + c * kTileSlices;
      Quad<T> weight = z.noisy(code, place.quad);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        weight.at[i] =
            short_cut ? weight.at[i] * scale[i] : exp_of((weight.at[i] - reference[place.quad].at[i]) * inverse_tau);
        sums.at[i].noisy_sum += weight.at[i];
      }
      z.set_weight(code, place.quad, weight);
    }
    __syncthreads();
    z.rescale(reinterpret_cast<const T*>(factor));
    z.add();
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    if (short_cut) sums.at[i].best.noisy = sums.at[i].plain.noisy_of(sums.at[i].best.noisy);
    parts[place.slice * kTilePixels + place.quad * kQuad + i] = sums.at[i];
  }
  __syncthreads();
  if (leads) {
    PixelSums<T> total = parts[threadIdx.x];
    for (int slice = 1; slice < kTileSlices; ++slice) {
      const PixelSums<T>& part = parts[slice * kTilePixels + threadIdx.x];
      if (part.best.beats(total.best)) total.best = part.best;
      total.noisy_sum += part.noisy_sum;
      total.plain.merge(part.plain);
    }
    total.best.noisy = my_reference;  // what the sum is relative to; in the short cut they differ by rounding
    my_factor = 1 / total.noisy_sum;
    pixel_code[threadIdx.x] = total.best.code;
    const int64_t pixel = first_pixel + threadIdx.x;
    if (blockIdx.y == 0 && pixel < s.pixels) {
      total.write(s, p.stats + image * kGumbelStats * s.pixels, pixel);
      p.codes[image * s.pixels + pixel] = total.best.code;
    }
  }
  __syncthreads();
  z.for_each([&](int pixel_of_tile, int channel_of_block, T sum) {
    const int64_t pixel = first_pixel + pixel_of_tile, channel = first_channel + channel_of_block;
    if (pixel >= s.pixels || channel >= p.channels) return;
    const T soft = sum * reinterpret_cast<const T*>(factor)[pixel_of_tile];
    p.soft[(image * s.pixels + pixel) * p.channels + channel] = soft;
    S* const out = p.z + image * p.channels * s.pixels + channel * p.z_strides.code + pixel * p.z_strides.pixel;
    *out = p.hard ? p.codebook[pixel_code[pixel_of_tile] * p.channels + channel] : narrow<S>(soft);
  });
}

}  // namespace

template <typename S>
cudaError_t launch_gumbel_quantize_forward(const QuantizeForward<S>& params, cudaStream_t stream) {
  using T = Arithmetic<S>;
  using Product = ForwardProduct<S>;
  constexpr size_t kParts = sizeof(PixelSums<T>) * kTileSlices * kTilePixels;
  const GumbelShape& s = params.shape;
  const dim3 grid(static_cast<unsigned>(s.batch * tiles_of(s.pixels, kTilePixels)),
                  static_cast<unsigned>(tiles_of(params.channels, Product::kChannels)));
  const size_t shared_bytes = Product::kSharedBytes > kParts ? Product::kSharedBytes : kParts;
  const cudaError_t error = with_short_cut(s, [&](auto short_cut) {
    return launch(forward_kernel<S, short_cut.value>, grid, kTileThreads, shared_bytes, stream, params);
  });
  if (error != cudaSuccess) return error;
  return launch_sum_kl(s, params.stats, params.kl, stream);
}

template cudaError_t launch_gumbel_quantize_forward(const QuantizeForward<float>&, cudaStream_t);
template cudaError_t launch_gumbel_quantize_forward(const QuantizeForward<double>&, cudaStream_t);
template cudaError_t launch_gumbel_quantize_forward(const QuantizeForward<BFloat16>&, cudaStream_t);
template cudaError_t launch_gumbel_quantize_forward(const QuantizeForward<Half>&, cudaStream_t);

}  // namespace dalle_fast
