// A block owns eight pixels of an image and all their codes, in two sweeps over these.
//
// Forward: the first sweep draws the noise and keeps running maxima and sums for each pixel; the second writes y.
// Backward: the first sweep draws the noise again and sums y * dy; the second writes the gradient.
//
// Drawing noise costs more than memory does, so the first sweep leaves what it made (noisy logits, in the short cut
// exponentials of them, or y) in shared memory: 7,000 codes in float32 on sm_90. The second sweep draws again only for
// the codes beyond. It runs from the last code to the first, since what was read last is still in the L2 cache: in
// float32 the 256 KB of logits that each of 132 blocks has in work take 35 MB of it. So y costs one read and one write
// of memory.
#include "cuda/reduce.h"
#include "gumbel/cuda_quad.h"

namespace dalle_fast {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kQuads = 2;  // of a block
constexpr int kPixels = kQuads * kQuad;
constexpr int kSlices = kThreads / kQuads;  // threads that share the codes of a quad
constexpr int kStaticShared = 8 * 1024;     // bytes, more than the kernels declare

// Codes a thread has in flight.
template <typename T>
constexpr int kBatch = sizeof(T) == 4 ? 4 : 1;

// Where a thread works: neighbouring lanes read neighbouring memory.
struct Place {
  bool pixels_first;  // NCHW: lanes alternate between the quads; else a warp has one of them
  int quad, slice;
  int64_t image, pixel;  // of the block; its first
  int64_t my_pixel;

  DF_DEVICE Place(const GumbelShape& s, GridStrides strides) : pixels_first(strides.pixel == 1) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    quad = (pixels_first ? lane : warp) % kQuads;
    slice = pixels_first ? threadIdx.x / kQuads : warp / kQuads * kWarp + lane;
    const int64_t tiles = (s.pixels + kPixels - 1) / kPixels;
    image = blockIdx.x / tiles;
    pixel = blockIdx.x % tiles * kPixels;
    my_pixel = pixel + quad * kQuad;
  }
};

unsigned blocks(const GumbelShape& s) { return static_cast<unsigned>(s.batch * ((s.pixels + kPixels - 1) / kPixels)); }

template <typename V>
DF_DEVICE void swap_if(bool wanted, V& a, V& b) {
  const V old = a;
  if (wanted) a = b, b = old;
}

// Reduces each pixel over all threads: warp p < kPixels returns pixel p. `parts` is shared.
template <typename V, typename Op>
DF_DEVICE V reduce_pixels(Quad<V> mine, const Place& place, V zero, Op op, V (*parts)[kPixels]) {
  static_assert(kQuads == 2 && kWarps <= kWarp && kPixels <= kWarps);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  // Two lanes share the four pixels: each gives the other one half. So they do once more, and have one left.
  const bool upper = lane & 16, odd = lane & 8;
  V(&x)[kQuad] = mine.at;
  swap_if(upper, x[0], x[2]);
  swap_if(upper, x[1], x[3]);
  x[0] = op(x[0], shuffle_xor(x[2], 16));
  x[1] = op(x[1], shuffle_xor(x[3], 16));
  swap_if(odd, x[0], x[1]);
  V one = op(x[0], shuffle_xor(x[1], 8));
  one = op(one, shuffle_xor(one, 4));
  one = op(one, shuffle_xor(one, 2));
  if (!place.pixels_first) one = op(one, shuffle_xor(one, 1));
  if ((lane & (place.pixels_first ? 6 : 7)) == 0) {
    parts[place.pixels_first ? warp : warp / kQuads][place.quad * kQuad + 2 * upper + odd] = one;
  }
  __syncthreads();
  const int count = place.pixels_first ? kWarps : kWarps / kQuads;
  return warp_reduce(warp < kPixels && lane < count ? parts[lane][warp] : zero, op);
}

// Calls body(code of each of the batch) for the thread's codes in order, or in the reverse order of batches.
template <int batch, bool backwards, typename Body>
DF_DEVICE void for_each_batch(int64_t codes, int slice, const Body& body) {
  constexpr int64_t kStep = int64_t{batch} * kSlices;
  const int64_t batches = (codes + kStep - 1) / kStep;
  for (int64_t b = 0; b < batches; ++b) body((backwards ? batches - 1 - b : b) * kStep + slice);
}

template <typename S, bool short_cut>
__global__ void __launch_bounds__(kThreads) forward_kernel(GumbelForward<S> p, int64_t kept) {
  using T = Arithmetic<S>;
  constexpr int kCodes = kBatch<T>;
  constexpr T kLowest = std::numeric_limits<T>::lowest();
  const GumbelShape& s = p.shape;
  const T inverse_tau = static_cast<T>(1 / s.tau);
  const Place place(s, p.strides);
  const QuadGrid<const S> logits_grid(p.logits, s, p.strides, place.image);
  const QuadGrid<S> y_grid(p.y, s, p.strides, place.image);
  const QuadNoise noise(s, place.image);
  DF_SHARED(shared);
  auto* kept_codes = reinterpret_cast<Quad<T>*>(shared);  // [kept][kQuads]
  __shared__ PixelSums<T> parts[kWarps][kPixels];
  __shared__ PixelStats<T> pixel_stats[kPixels];
  __shared__ int pixel_code[kPixels];

  constexpr PixelSums<T> kNone = PixelSums<T>::none();
  Quad<PixelSums<T>> sums{{kNone, kNone, kNone, kNone}};
  for_each_batch<kCodes, false>(s.codes, place.slice, [&](int64_t first) {
    Quad<T> logits[kCodes], noisy[kCodes];  // in the short cut E, then exp(noisy - reference)
#pragma unroll
    for (int c = 0; c < kCodes; ++c) {
      const int64_t code = first + c * kSlices;
      if (code < s.codes) logits[c] = logits_grid.load(code, place.my_pixel);
    }
#pragma unroll
    for (int c = 0; c < kCodes; ++c) {
      const int64_t code = first + c * kSlices;
      if (code >= s.codes) continue;
      noisy[c] = short_cut ? noise.exponential<T>(code, place.my_pixel) : noise.add_to(logits[c], code, place.my_pixel);
    }
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      PixelSums<T>& sum = sums.at[i];
      T plain_max = kLowest;
#pragma unroll
      for (int c = 0; c < kCodes; ++c) {
        if (first + c * kSlices < s.codes && logits[c].at[i] > plain_max) plain_max = logits[c].at[i];
      }
      if (sum.plain.too_low_for(plain_max)) {
        const T factor = sum.plain.raise(plain_max);
        if (short_cut) {
          sum.best.noisy *= factor;
          sum.noisy_sum *= factor;
          for (int64_t code = place.slice; code < first && code < kept; code += kSlices) {
            kept_codes[code * kQuads + place.quad].at[i] *= factor;
          }
        }
      }
      const T largest = sum.best.noisy;
#pragma unroll
      for (int c = 0; c < kCodes; ++c) {
        const int64_t code = first + c * kSlices;
        if (code >= s.codes) continue;
        const T plain = sum.plain.add(logits[c].at[i]);
        if (short_cut) {
          noisy[c].at[i] = ratio_of(plain, noisy[c].at[i]);
          sum.noisy_sum += noisy[c].at[i];
        }
        if (noisy[c].at[i] > sum.best.noisy) sum.best = {noisy[c].at[i], static_cast<int>(code)};
      }
      if (short_cut) continue;
      sum.noisy_sum *= exp_of((largest - sum.best.noisy) * inverse_tau);
#pragma unroll
      for (int c = 0; c < kCodes; ++c) {
        if (first + c * kSlices < s.codes) sum.noisy_sum += exp_of((noisy[c].at[i] - sum.best.noisy) * inverse_tau);
      }
    }
#pragma unroll
    for (int c = 0; c < kCodes; ++c) {
      const int64_t code = first + c * kSlices;
      if (code < kept) kept_codes[code * kQuads + place.quad] = noisy[c];
    }
  });
  T reference[kQuad];  // of the exponentials that the thread has kept
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    PixelSums<T>& sum = sums.at[i];
    reference[i] = sum.plain.reference;
    if (short_cut) {
      if (sum.best.noisy > 0) sum.noisy_sum /= sum.best.noisy;
      sum.best.noisy = sum.plain.noisy_of(sum.best.noisy);
    }
  }

  const PixelSums<T> total = reduce_pixels(sums, place, kNone, MergeSums<T>{inverse_tau}, parts);
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0 && warp < kPixels) {
    pixel_stats[warp] = {total.best.noisy, static_cast<T>(log(static_cast<double>(total.noisy_sum))), 0, 0};
    pixel_code[warp] = total.best.code;
    if (place.pixel + warp < s.pixels) {
      total.write(s, p.stats + place.image * kGumbelStats * s.pixels, place.pixel + warp);
      p.codes[place.image * s.pixels + place.pixel + warp] = total.best.code;
    }
  }
  __syncthreads();

  PixelStats<T> stats[kQuad];
  int best_code[kQuad];
  T factor[kQuad];
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    stats[i] = pixel_stats[place.quad * kQuad + i];
    best_code[i] = pixel_code[place.quad * kQuad + i];
    factor[i] = stats[i].soft(reference[i], inverse_tau);
  }
  for_each_batch<1, true>(s.codes, place.slice, [&](int64_t code) {
    if (code >= s.codes) return;
    Quad<T> y;
    if (p.hard) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) y.at[i] = code == best_code[i] ? T(1) : T(0);
    } else if (code < kept) {
      y = kept_codes[code * kQuads + place.quad];
#pragma unroll
      for (int i = 0; i < kQuad; ++i) y.at[i] = short_cut ? y.at[i] * factor[i] : stats[i].soft(y.at[i], inverse_tau);
    } else {
      const Quad<T> logits = logits_grid.load(code, place.my_pixel);
      y = soft_quad<short_cut>(noise, logits, code, place.my_pixel, stats, inverse_tau);
    }
    y_grid.store(code, place.my_pixel, y);
  });
}

template <typename S, bool short_cut>
__global__ void __launch_bounds__(kThreads) backward_kernel(GumbelBackward<S> p, int64_t kept) {
  using T = Arithmetic<S>;
  constexpr int kCodes = kBatch<T>;
  const GumbelShape& s = p.shape;
  const T inverse_tau = static_cast<T>(1 / s.tau), log_codes = static_cast<T>(log(static_cast<double>(s.codes)));
  const Place place(s, p.strides);
  const QuadGrid<const S> logits_grid(p.logits, s, p.strides, place.image);
  const QuadGrid<const S> dy_grid(p.grad_y, s, p.dy_strides, place.image);
  const QuadGrid<S> grad_grid(p.grad_logits, s, p.strides, place.image);
  const QuadNoise noise(s, place.image);
  const T grad_kl = p.grad_kl[place.image];
  DF_SHARED(shared);
  auto* kept_y = reinterpret_cast<Quad<T>*>(shared);  // [kept][kQuads]
  __shared__ T parts[kWarps][kPixels];
  __shared__ T pixel_dot[kPixels];

  PixelStats<T> stats[kQuad];
#pragma unroll
  for (int i = 0; i < kQuad; ++i) stats[i] = load_stats(s, p.stats, place.image, place.my_pixel + i);
  const auto soft = [&](const Quad<T>& logits, int64_t code) {
    return soft_quad<short_cut>(noise, logits, code, place.my_pixel, stats, inverse_tau);
  };
  const auto load = [&](int64_t first, Quad<T>(&logits)[kCodes], Quad<T>(&dy)[kCodes]) {
#pragma unroll
    for (int c = 0; c < kCodes; ++c) {
      const int64_t code = first + c * kSlices;
      if (code >= s.codes) continue;
      logits[c] = logits_grid.load(code, place.my_pixel);
      dy[c] = dy_grid.load(code, place.my_pixel);
    }
  };

  Quad<T> dots{};
  for_each_batch<kCodes, false>(s.codes, place.slice, [&](int64_t first) {
    Quad<T> logits[kCodes], dy[kCodes];
    load(first, logits, dy);
#pragma unroll
    for (int c = 0; c < kCodes; ++c) {
      const int64_t code = first + c * kSlices;
      if (code >= s.codes) continue;
      const Quad<T> y = soft(logits[c], code);
      if (code < kept) kept_y[code * kQuads + place.quad] = y;
#pragma unroll
      for (int i = 0; i < kQuad; ++i) dots.at[i] += y.at[i] * dy[c].at[i];
    }
  });

  const T total = reduce_pixels(dots, place, T(0), Add{}, parts);
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0 && warp < kPixels) pixel_dot[warp] = total;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kQuad; ++i) dots.at[i] = pixel_dot[place.quad * kQuad + i];

  for_each_batch<kCodes, true>(s.codes, place.slice, [&](int64_t first) {
    Quad<T> logits[kCodes], dy[kCodes];
    load(first, logits, dy);
#pragma unroll
    for (int c = 0; c < kCodes; ++c) {
      const int64_t code = first + c * kSlices;
      if (code >= s.codes) continue;
      Quad<T> grad = code < kept ? kept_y[code * kQuads + place.quad] : soft(logits[c], code);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        grad.at[i] = grad.at[i] * inverse_tau * (dy[c].at[i] - dots.at[i]) +
                     grad_kl * stats[i].kl_gradient(logits[c].at[i], log_codes);
      }
      grad_grid.store(code, place.my_pixel, grad);
    }
  });
}

// One block an image.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_kl_kernel(int64_t pixels, const T* stats, T* kl) {
  __shared__ double scratch[kWarps];
  const T* pixel_kl = stats + (int64_t{blockIdx.x} * kGumbelStats + kPixelKl) * pixels;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < pixels; i += kThreads) sum += pixel_kl[i];
  sum = block_reduce<kThreads>(sum, Add{}, scratch);
  if (threadIdx.x == 0) kl[blockIdx.x] = static_cast<T>(sum);
}

// Launches kernel(params, kept) with as many of `codes` kept as shared memory holds.
template <typename Kernel, typename Params>
cudaError_t launch_sweeps(Kernel kernel, const Params& params, int64_t codes, size_t element_bytes,
                          cudaStream_t stream) {
  int shared_bytes;
  const cudaError_t error = max_shared_bytes(&shared_bytes);
  if (error != cudaSuccess) return error;
  const int64_t code_bytes = kPixels * element_bytes, room = (shared_bytes - kStaticShared) / code_bytes;
  const int64_t kept = codes < room ? codes : room;
  return launch(kernel, blocks(params.shape), kThreads, kept * code_bytes, stream, params, kept);
}

}  // namespace

template <typename T>
cudaError_t launch_sum_kl(const GumbelShape& shape, const T* stats, T* kl, cudaStream_t stream) {
  return launch(sum_kl_kernel<T>, static_cast<unsigned>(shape.batch), kThreads, 0, stream, shape.pixels, stats, kl);
}

template <typename S>
cudaError_t launch_gumbel_softmax_forward(const GumbelForward<S>& params, cudaStream_t stream) {
  const cudaError_t error = with_short_cut(params.shape, [&](auto short_cut) {
    const int64_t codes = params.hard ? 0 : params.shape.codes;  // one-hots need no second look
    return launch_sweeps(forward_kernel<S, short_cut.value>, params, codes, sizeof(Arithmetic<S>), stream);
  });
  if (error != cudaSuccess) return error;
  return launch_sum_kl(params.shape, params.stats, params.kl, stream);
}

template <typename S>
cudaError_t launch_gumbel_softmax_backward(const GumbelBackward<S>& params, cudaStream_t stream) {
  return with_short_cut(params.shape, [&](auto short_cut) {
    return launch_sweeps(backward_kernel<S, short_cut.value>, params, params.shape.codes, sizeof(Arithmetic<S>),
                         stream);
  });
}

template cudaError_t launch_sum_kl(const GumbelShape&, const float*, float*, cudaStream_t);
template cudaError_t launch_sum_kl(const GumbelShape&, const double*, double*, cudaStream_t);
template cudaError_t launch_gumbel_softmax_forward(const GumbelForward<float>&, cudaStream_t);
template cudaError_t launch_gumbel_softmax_forward(const GumbelForward<double>&, cudaStream_t);
template cudaError_t launch_gumbel_softmax_forward(const GumbelForward<BFloat16>&, cudaStream_t);
template cudaError_t launch_gumbel_softmax_forward(const GumbelForward<Half>&, cudaStream_t);
template cudaError_t launch_gumbel_softmax_backward(const GumbelBackward<float>&, cudaStream_t);
template cudaError_t launch_gumbel_softmax_backward(const GumbelBackward<double>&, cudaStream_t);
template cudaError_t launch_gumbel_softmax_backward(const GumbelBackward<BFloat16>&, cudaStream_t);
template cudaError_t launch_gumbel_softmax_backward(const GumbelBackward<Half>&, cudaStream_t);

}  // namespace dalle_fast
