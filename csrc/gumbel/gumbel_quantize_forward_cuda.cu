// The product of the relaxed sample with the codebook W, as flash attention with V = W. A block owns 64 pixels and 128
// channels (64 in float64) and goes once through all codes, 64 at a time: it draws their noise, raises the reference of
// each pixel to the largest noisy logit so far, leaves exp((noisy - reference) / tau) in shared memory, rescales z,
// which stays in registers, and adds the product with these codes' rows of the codebook. Sums for the statistics stay
// with the thread that owns a quad's codes and are merged at the end. If one block cannot own all channels, more blocks
// draw the noise again.
//
// 16-bit tensors use tensor cores; these have too few bits for float32, which takes the FP32 units and eight times as
// long.
#include "cuda/intrinsics.h"
#include "gumbel/cuda_product_mma.h"

namespace dalle_fast {

using namespace gumbel;

namespace {

// Shared memory of a block besides the operands of the product.
template <typename T>
struct Shared {
  Quad<T> maxima[kTileSlices][kTileQuads];  // of the noisy logits of a tile, thread by thread
  Quad<T> reference[kTileQuads];            // the largest noisy logit of each pixel so far
  Quad<T> factor[kTileQuads];               // by which a raised reference shrinks z; at the end, 1 / sum
  int code[kTilePixels];
};

// The phases of the forward, for the codes of a thread's slice at its quad.
template <typename S, bool short_cut>
class Forward {
 public:
  using T = Arithmetic<S>;
  using Product = ForwardProduct<S>;

  DF_DEVICE Forward(const QuantizeForward<S>& p, Shared<T>& shared)
      : p_(p),
        s_(p.shape),
        shared_(shared),
        codes_(static_cast<int>(p.shape.codes)),
        inverse_tau_(static_cast<T>(1 / p.shape.tau)),
        image_(blockIdx.x / tiles_of(p.shape.pixels, kTilePixels)),
        first_pixel_(blockIdx.x % tiles_of(p.shape.pixels, kTilePixels) * kTilePixels),
        place_(p.strides),
        my_pixel_(first_pixel_ + place_.quad * kQuad),
        grid_(p.logits, p.shape, p.strides, image_),
        noise_(p.shape, image_) {
    if (leads()) reference() = kLowest;
  }

  DF_DEVICE void load(int first, Quad<T> (&logits)[kThreadCodes]) const {
#pragma unroll
    for (int c = 0; c < kThreadCodes; ++c) {
      const int code = first + place_.slice + c * kTileSlices;
      if (code < codes_) logits[c] = grid_.load(code, my_pixel_);
    }
  }

  // Makes the thread's sums relative to the tile's largest logits, where these are too large.
  DF_DEVICE void raise_references(int first, const Quad<T> (&logits)[kThreadCodes], Quad<RunningSums<T>>& sums) const {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      T largest = kLowest;
#pragma unroll
      for (int c = 0; c < kThreadCodes; ++c) {
        const bool inside = first + place_.slice + c * kTileSlices < codes_;
        if (inside && logits[c].at[i] > largest) largest = logits[c].at[i];
      }
      if (!sums.at[i].plain.too_low_for(largest)) continue;
      const T factor = sums.at[i].plain.raise(largest);
      if (short_cut) sums.at[i].best.noisy *= factor;
    }
  }

  // Draws the noise; leaves noisy logits (in the short cut exp(noisy - the thread's reference)) and their maxima.
  DF_DEVICE void draw(int first, const Quad<T> (&logits)[kThreadCodes], Quad<RunningSums<T>>& sums,
                      const Product& z) const {
    constexpr T kNothing = short_cut ? T(0) : -std::numeric_limits<T>::infinity();
    Quad<T> most;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) most.at[i] = short_cut ? T(0) : kLowest;
#pragma unroll
    for (int c = 0; c < kThreadCodes; ++c) {
      const int code = first + place_.slice + c * kTileSlices;
      Quad<T> noisy{{kNothing, kNothing, kNothing, kNothing}};  // in the short cut E, then its exponential
      if (code < codes_) {
        noisy = short_cut ? noise_.exponential<T>(code, my_pixel_) : noise_.add_to(logits[c], code, my_pixel_);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          const T weight = sums.at[i].plain.add(logits[c].at[i]);
          if (short_cut) noisy.at[i] = ratio_of(weight, noisy.at[i]);
          if (noisy.at[i] > most.at[i]) most.at[i] = noisy.at[i];
          if (noisy.at[i] > sums.at[i].best.noisy) sums.at[i].best = {noisy.at[i], code};
        }
      }
      z.noisy(place_.slice + c * kTileSlices, place_.quad) = noisy;
    }
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (short_cut) most.at[i] = sums.at[i].plain.noisy_of(most.at[i]);
    }
    shared_.maxima[place_.slice][place_.quad] = most;
  }

  // Raises the shared references to the tile's maxima: one thread per pixel.
  DF_DEVICE void raise_shared_references() const {
    if (!leads()) return;
    T largest = reference();
#pragma unroll
    for (int slice = 0; slice < kTileSlices; ++slice) {
      const T x = reinterpret_cast<const T*>(shared_.maxima[slice])[threadIdx.x];
      largest = x > largest ? x : largest;
    }
    factor() = exp_of((reference() - largest) * inverse_tau_);
    reference() = largest;
  }

  // Turns what draw() left into weights, and adds these to the sums.
  DF_DEVICE void weigh(Quad<RunningSums<T>>& sums, const Product& z) const {
    T scale[kQuad];  // from the thread's reference, in the short cut, to the shared one
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      sums.at[i].noisy_sum *= shared_.factor[place_.quad].at[i];
      scale[i] = exp_of(sums.at[i].plain.reference - shared_.reference[place_.quad].at[i]);
    }
#pragma unroll
    for (int c = 0; c < kThreadCodes; ++c) {
      const int code = place_.slice + c * kTileSlices;
      Quad<T> weight = z.noisy(code, place_.quad);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        weight.at[i] = short_cut ? weight.at[i] * scale[i]
                                 : exp_of((weight.at[i] - shared_.reference[place_.quad].at[i]) * inverse_tau_);
        sums.at[i].noisy_sum += weight.at[i];
      }
      z.set_weight(code, place_.quad, weight);
    }
  }

  // Leaves the thread's sums in `parts` [kTileSlices][kTilePixels].
  DF_DEVICE void share(Quad<RunningSums<T>>& sums, RunningSums<T>* parts) const {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (short_cut) sums.at[i].best.noisy = sums.at[i].plain.noisy_of(sums.at[i].best.noisy);
      parts[place_.slice * kTilePixels + place_.quad * kQuad + i] = sums.at[i];
    }
  }

  // Each pixel's statistics and code, from the parts: one thread per pixel.
  DF_DEVICE void pick(const RunningSums<T>* parts) const {
    if (!leads()) return;
    RunningSums<T> total = parts[threadIdx.x];
    for (int slice = 1; slice < kTileSlices; ++slice) {
      const RunningSums<T>& part = parts[slice * kTilePixels + threadIdx.x];
      if (part.best.beats(total.best)) total.best = part.best;
      total.noisy_sum += part.noisy_sum;
      total.plain.merge(part.plain);
    }
    total.best.noisy = reference();  // of the sum; in the short cut the two differ by rounding
    factor() = 1 / total.noisy_sum;
    shared_.code[threadIdx.x] = total.best.code;
    const int64_t pixel = first_pixel_ + threadIdx.x;
    if (blockIdx.y == 0 && pixel < s_.pixels) {
      total.write(s_, p_.stats + image_ * kGumbelStats * s_.pixels, pixel);
      p_.codes[image_ * s_.pixels + pixel] = total.best.code;
    }
  }

  // z [channels, pixels], and z before `hard` and rounding for the backward.
  DF_DEVICE void store(const Product& z, int64_t first_channel) const {
    z.for_each([&](int pixel_of_tile, int channel_of_block, T sum) {
      const int64_t pixel = first_pixel_ + pixel_of_tile, channel = first_channel + channel_of_block;
      if (pixel >= s_.pixels || channel >= p_.channels) return;
      const T factor = factors()[pixel_of_tile], soft = sum * factor;
      p_.soft[(image_ * s_.pixels + pixel) * p_.channels + channel] = soft;
      S* const out = p_.z + image_ * p_.channels * s_.pixels + channel * p_.z_strides.code + pixel * p_.z_strides.pixel;
      const bool has_best = isfinite(factor);  // not so with NaN: z is NaN then
      *out = p_.hard && has_best ? p_.codebook[shared_.code[pixel_of_tile] * p_.channels + channel] : narrow<S>(soft);
    });
  }

  DF_DEVICE T* factors() const { return reinterpret_cast<T*>(shared_.factor); }

 private:
  static constexpr T kLowest = std::numeric_limits<T>::lowest();

  // One thread per pixel, and its elements of the shared arrays.
  DF_DEVICE static bool leads() { return threadIdx.x < kTilePixels; }
  DF_DEVICE T& reference() const { return reinterpret_cast<T*>(shared_.reference)[threadIdx.x % kTilePixels]; }
  DF_DEVICE T& factor() const { return factors()[threadIdx.x % kTilePixels]; }

  const QuantizeForward<S>& p_;
  const GumbelShape& s_;
  Shared<T>& shared_;
  const int codes_;
  const T inverse_tau_;
  const int64_t image_, first_pixel_;
  const TilePlace place_;
  const int64_t my_pixel_;
  const QuadGrid<const S> grid_;
  const QuadNoise noise_;
};

template <typename S, bool short_cut>
__global__ void __launch_bounds__(kProductThreads, kProductBlocks<S>) forward_kernel(QuantizeForward<S> p) {
  using T = Arithmetic<S>;
  using Product = ForwardProduct<S>;
  DF_SHARED(bytes);
  __shared__ Shared<T> shared;
  const Forward<S, short_cut> forward(p, shared);
  Product z(bytes);
  const int codes = static_cast<int>(p.shape.codes);
  const int64_t first_channel = int64_t{blockIdx.y} * Product::kChannels;
  constexpr RunningSums<T> kNone = RunningSums<T>::none();
  Quad<RunningSums<T>> sums{{kNone, kNone, kNone, kNone}};
  for (int first = 0; first < codes; first += kTileCodes) {
    Quad<T> logits[kThreadCodes];
    forward.load(first, logits);
    forward.raise_references(first, logits, sums);
    forward.draw(first, logits, sums, z);
    z.load_codebook(p.codebook, codes, p.channels, first, first_channel);
    __syncthreads();
    forward.raise_shared_references();
    __syncthreads();
    forward.weigh(sums, z);
    __syncthreads();
    z.rescale(forward.factors());
    z.add();
    __syncthreads();
  }
  auto* const parts = reinterpret_cast<RunningSums<T>*>(bytes);  // in place of the operands
  forward.share(sums, parts);
  __syncthreads();
  forward.pick(parts);
  __syncthreads();
  forward.store(z, first_channel);
}

}  // namespace

template <typename S>
cudaError_t launch_gumbel_quantize_forward(const QuantizeForward<S>& params, cudaStream_t stream) {
  using T = Arithmetic<S>;
  using Product = ForwardProduct<S>;
  constexpr size_t kParts = sizeof(RunningSums<T>) * kTileSlices * kTilePixels;
  const GumbelShape& s = params.shape;
  const dim3 grid(static_cast<unsigned>(s.batch * tiles_of(s.pixels, kTilePixels)),
                  static_cast<unsigned>(tiles_of(params.channels, Product::kChannels)));
  const size_t shared_bytes = Product::kSharedBytes > kParts ? Product::kSharedBytes : kParts;
  const cudaError_t error = with_short_cut(s, [&](auto short_cut) {
    return launch(forward_kernel<S, short_cut.value>, grid, kProductThreads, shared_bytes, stream, params);
  });
  if (error != cudaSuccess) return error;
  return launch_sum_kl(s, params.stats, params.kl, stream);
}

template cudaError_t launch_gumbel_quantize_forward(const QuantizeForward<float>&, cudaStream_t);
template cudaError_t launch_gumbel_quantize_forward(const QuantizeForward<double>&, cudaStream_t);
template cudaError_t launch_gumbel_quantize_forward(const QuantizeForward<BFloat16>&, cudaStream_t);
template cudaError_t launch_gumbel_quantize_forward(const QuantizeForward<Half>&, cudaStream_t);

}  // namespace dalle_fast
