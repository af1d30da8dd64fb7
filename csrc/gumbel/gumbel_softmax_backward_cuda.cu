// Two sweeps over the codes (cuda_sweeps.h): the first draws the noise again and sums y dy for each pixel, the second
// writes the gradient.
#include "gumbel/cuda_sweeps.h"

namespace dalle_fast {

using namespace gumbel;

namespace {

// The phases of the backward, for the codes of a thread's slice at its quad.
template <typename S, bool short_cut>
class Backward {
 public:
  using T = Arithmetic<S>;

  // `kept_y` is shared memory, [kept][kSweepQuads].
  DF_DEVICE Backward(const GumbelBackward<S>& p, int64_t kept, Quad<T>* kept_y)
      : p_(p),
        s_(p.shape),
        kept_(kept),
        kept_y_(kept_y),
        inverse_tau_(static_cast<T>(1 / p.shape.tau)),
        log_codes_(static_cast<T>(log(static_cast<double>(p.shape.codes)))),
        place_(p.shape, p.strides),
        logits_grid_(p.logits, p.shape, p.strides, place_.image),
        dy_grid_(p.grad_y, p.shape, p.dy_strides, place_.image),
        grad_grid_(p.grad_logits, p.shape, p.strides, place_.image),
        noise_(p.shape, place_.image),
        grad_kl_(p.grad_kl[place_.image]) {}

  DF_DEVICE void load(ForwardStats<T> (&stats)[kQuad]) const {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) stats[i] = load_stats(s_, p_.stats, place_.image, place_.my_pixel + i);
  }

  // First sweep: the sums of y dy over all codes, at the thread's quad. `parts` and `pixel_dots` are shared memory.
  DF_DEVICE Quad<T> sum(const ForwardStats<T> (&stats)[kQuad], T (*parts)[kSweepPixels],
                        T (&pixel_dots)[kSweepPixels]) const {
    Quad<T> dots{};
    for_each_batch_of_codes<kCodes, false>(s_.codes, place_.slice, [&](int64_t first) {
      Quad<T> logits[kCodes], dy[kCodes];
      load(first, logits, dy);
#pragma unroll
      for (int c = 0; c < kCodes; ++c) {
        const int64_t code = first + c * kSweepSlices;
        if (code >= s_.codes) continue;
        const Quad<T> y = soft(logits[c], code, stats);
        if (code < kept_) kept_y_[code * kSweepQuads + place_.quad] = y;
#pragma unroll
        for (int i = 0; i < kQuad; ++i) dots.at[i] += y.at[i] * dy[c].at[i];
      }
    });
    const T total = reduce_pixels(dots, place_, T(0), Add{}, parts);
    const int warp = threadIdx.x / kWarp;
    if (threadIdx.x % kWarp == 0 && warp < kSweepPixels) pixel_dots[warp] = total;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kQuad; ++i) dots.at[i] = pixel_dots[place_.quad * kQuad + i];
    return dots;
  }

  // Second sweep: the gradient.
  DF_DEVICE void store(const ForwardStats<T> (&stats)[kQuad], const Quad<T>& dots) const {
    for_each_batch_of_codes<kCodes, true>(s_.codes, place_.slice, [&](int64_t first) {
      Quad<T> logits[kCodes], dy[kCodes];
      load(first, logits, dy);
#pragma unroll
      for (int c = 0; c < kCodes; ++c) {
        const int64_t code = first + c * kSweepSlices;
        if (code >= s_.codes) continue;
        Quad<T> grad = code < kept_ ? kept_y_[code * kSweepQuads + place_.quad] : soft(logits[c], code, stats);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          grad.at[i] = grad.at[i] * inverse_tau_ * (dy[c].at[i] - dots.at[i]) +
                       grad_kl_ * stats[i].kl_gradient(logits[c].at[i], log_codes_);
        }
        grad_grid_.store(code, place_.my_pixel, grad);
      }
    });
  }

 private:
  static constexpr int kCodes = kSweepCodes<T>;  // of a batch

  DF_DEVICE void load(int64_t first, Quad<T> (&logits)[kCodes], Quad<T> (&dy)[kCodes]) const {
#pragma unroll
    for (int c = 0; c < kCodes; ++c) {
      const int64_t code = first + c * kSweepSlices;
      if (code >= s_.codes) continue;
      logits[c] = logits_grid_.load(code, place_.my_pixel);
      dy[c] = dy_grid_.load(code, place_.my_pixel);
    }
  }

  DF_DEVICE Quad<T> soft(const Quad<T>& logits, int64_t code, const ForwardStats<T> (&stats)[kQuad]) const {
    return soft_quad<short_cut>(noise_, logits, code, place_.my_pixel, stats, inverse_tau_);
  }

  const GumbelBackward<S>& p_;
  const GumbelShape& s_;
  const int64_t kept_;
  Quad<T>* const kept_y_;
  const T inverse_tau_, log_codes_;
  const SweepPlace place_;
  const QuadGrid<const S> logits_grid_, dy_grid_;
  const QuadGrid<S> grad_grid_;
  const QuadNoise noise_;
  const T grad_kl_;
};

template <typename S, bool short_cut>
__global__ void __launch_bounds__(kSweepThreads) backward_kernel(GumbelBackward<S> p, int64_t kept) {
  using T = Arithmetic<S>;
  DF_SHARED(shared);
  __shared__ T parts[kSweepWarps][kSweepPixels], pixel_dots[kSweepPixels];
  const Backward<S, short_cut> backward(p, kept, reinterpret_cast<Quad<T>*>(shared));
  ForwardStats<T> stats[kQuad];
  backward.load(stats);
  const Quad<T> dots = backward.sum(stats, parts, pixel_dots);
  backward.store(stats, dots);
}

}  // namespace

template <typename S>
cudaError_t launch_gumbel_softmax_backward(const GumbelBackward<S>& params, cudaStream_t stream) {
  return with_short_cut(params.shape, [&](auto short_cut) {
    return launch_sweeps(backward_kernel<S, short_cut.value>, params, params.shape.codes, sizeof(Arithmetic<S>),
                         stream);
  });
}

template cudaError_t launch_gumbel_softmax_backward(const GumbelBackward<float>&, cudaStream_t);
template cudaError_t launch_gumbel_softmax_backward(const GumbelBackward<double>&, cudaStream_t);
template cudaError_t launch_gumbel_softmax_backward(const GumbelBackward<BFloat16>&, cudaStream_t);
template cudaError_t launch_gumbel_softmax_backward(const GumbelBackward<Half>&, cudaStream_t);

}  // namespace dalle_fast
