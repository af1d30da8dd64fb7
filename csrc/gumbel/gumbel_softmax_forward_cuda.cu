// Two sweeps over the codes (cuda_sweeps.h): the first draws the noise and keeps running maxima and sums for each
// pixel, the second writes y.
#include "gumbel/cuda_sweeps.h"

namespace dalle_fast {

using namespace gumbel;

namespace {

// Results of the first sweep, in shared memory for the second.
template <typename T>
struct Found {
  ForwardStats<T> stats[kSweepPixels];
  int code[kSweepPixels];
};

// The phases of the forward, for the codes of a thread's slice at its quad.
template <typename S, bool short_cut>
class Forward {
 public:
  using T = Arithmetic<S>;

  // `kept_codes` is shared memory, [kept][kSweepQuads].
  DF_DEVICE Forward(const GumbelForward<S>& p, int64_t kept, Quad<T>* kept_codes)
      : p_(p),
        s_(p.shape),
        kept_(kept),
        kept_codes_(kept_codes),
        inverse_tau_(static_cast<T>(1 / p.shape.tau)),
        place_(p.shape, p.strides),
        logits_grid_(p.logits, p.shape, p.strides, place_.image),
        y_grid_(p.y, p.shape, p.strides, place_.image),
        noise_(p.shape, place_.image) {}

  // First sweep: the thread's sums, and the references of the exponentials that it has kept.
  DF_DEVICE void sum(Quad<RunningSums<T>>& sums, T (&reference)[kQuad]) const {
    for_each_batch_of_codes<kCodes, false>(s_.codes, place_.slice, [&](int64_t first) {
      Quad<T> logits[kCodes], noisy[kCodes];  // in the short cut E, then exp(noisy - reference)
      load(first, logits);
      draw(first, logits, noisy);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        raise_reference(first, logits, i, sums.at[i]);
        add(first, logits, noisy, i, sums.at[i]);
      }
      keep(first, noisy);
    });
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      RunningSums<T>& sum = sums.at[i];
      reference[i] = sum.plain.reference;
      if (!short_cut) continue;
      if (sum.best.noisy > 0) sum.noisy_sum /= sum.best.noisy;
      sum.best.noisy = sum.plain.noisy_of(sum.best.noisy);
    }
  }

  // Each pixel's statistics and code, from the sums of all threads. `parts` is shared memory.
  DF_DEVICE void pick(const Quad<RunningSums<T>>& sums, RunningSums<T> (*parts)[kSweepPixels], Found<T>& found) const {
    const RunningSums<T> total = reduce_pixels(sums, place_, RunningSums<T>::none(), MergeSums<T>{inverse_tau_}, parts);
    const int warp = threadIdx.x / kWarp;
    if (threadIdx.x % kWarp != 0 || warp >= kSweepPixels) return;
    found.stats[warp] = {total.best.noisy, static_cast<T>(log(static_cast<double>(total.noisy_sum))), 0, 0};
    found.code[warp] = total.best.code;
    if (place_.pixel + warp >= s_.pixels) return;
    total.write(s_, p_.stats + place_.image * kGumbelStats * s_.pixels, place_.pixel + warp);
    p_.codes[place_.image * s_.pixels + place_.pixel + warp] = total.best.code;
  }

  // Second sweep: y.
  DF_DEVICE void store(const Found<T>& found, const T (&reference)[kQuad]) const {
    ForwardStats<T> stats[kQuad];
    int best_code[kQuad];
    T factor[kQuad];
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      stats[i] = found.stats[place_.quad * kQuad + i];
      best_code[i] = found.code[place_.quad * kQuad + i];
      factor[i] = stats[i].soft(reference[i], inverse_tau_);
    }
    for_each_batch_of_codes<1, true>(s_.codes, place_.slice, [&](int64_t code) {
      if (code >= s_.codes) return;
      Quad<T> y;
      if (p_.hard) {
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          const bool has_best = isfinite(stats[i].noisy_log_sum);  // not so with NaN
          y.at[i] = !has_best ? std::numeric_limits<T>::quiet_NaN() : code == best_code[i] ? T(1) : T(0);
        }
      } else if (code < kept_) {
        y = kept_codes_[code * kSweepQuads + place_.quad];
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          y.at[i] = short_cut ? y.at[i] * factor[i] : stats[i].soft(y.at[i], inverse_tau_);
        }
      } else {
        const Quad<T> logits = logits_grid_.load(code, place_.my_pixel);
        y = soft_quad<short_cut>(noise_, logits, code, place_.my_pixel, stats, inverse_tau_);
      }
      y_grid_.store(code, place_.my_pixel, y);
    });
  }

 private:
  static constexpr int kCodes = kSweepCodes<T>;  // of a batch

  DF_DEVICE void load(int64_t first, Quad<T> (&logits)[kCodes]) const {
#pragma unroll
    for (int c = 0; c < kCodes; ++c) {
      const int64_t code = first + c * kSweepSlices;
      if (code < s_.codes) logits[c] = logits_grid_.load(code, place_.my_pixel);
    }
  }

  DF_DEVICE void draw(int64_t first, const Quad<T> (&logits)[kCodes], Quad<T> (&noisy)[kCodes]) const {
#pragma unroll
    for (int c = 0; c < kCodes; ++c) {
      const int64_t code = first + c * kSweepSlices;
      if (code >= s_.codes) continue;
      noisy[c] =
          short_cut ? noise_.exponential<T>(code, place_.my_pixel) : noise_.add_to(logits[c], code, place_.my_pixel);
    }
  }

  // Makes the sums and kept exponentials of pixel i relative to the batch's largest logit, if that is too large.
  DF_DEVICE void raise_reference(int64_t first, const Quad<T> (&logits)[kCodes], int i, RunningSums<T>& sum) const {
    T largest = std::numeric_limits<T>::lowest();
#pragma unroll
    for (int c = 0; c < kCodes; ++c) {
      if (first + c * kSweepSlices < s_.codes && logits[c].at[i] > largest) largest = logits[c].at[i];
    }
    if (!sum.plain.too_low_for(largest)) return;
    const T factor = sum.plain.raise(largest);
    if (!short_cut) return;
    sum.best.noisy *= factor;
    sum.noisy_sum *= factor;
    for (int64_t code = place_.slice; code < first && code < kept_; code += kSweepSlices) {
      kept_codes_[code * kSweepQuads + place_.quad].at[i] *= factor;
    }
  }

  // Adds pixel i of the batch to its sums.
  DF_DEVICE void add(int64_t first, const Quad<T> (&logits)[kCodes], Quad<T> (&noisy)[kCodes], int i,
                     RunningSums<T>& sum) const {
    const T largest = sum.best.noisy;
#pragma unroll
    for (int c = 0; c < kCodes; ++c) {
      const int64_t code = first + c * kSweepSlices;
      if (code >= s_.codes) continue;
      const T plain = sum.plain.add(logits[c].at[i]);
      if (short_cut) {
        noisy[c].at[i] = ratio_of(plain, noisy[c].at[i]);
        sum.noisy_sum += noisy[c].at[i];
      }
      if (noisy[c].at[i] > sum.best.noisy) sum.best = {noisy[c].at[i], static_cast<int>(code)};
    }
    if (short_cut) return;
    sum.noisy_sum *= exp_of((largest - sum.best.noisy) * inverse_tau_);
#pragma unroll
    for (int c = 0; c < kCodes; ++c) {
      if (first + c * kSweepSlices < s_.codes)
        sum.noisy_sum += exp_of((noisy[c].at[i] - sum.best.noisy) * inverse_tau_);
    }
  }

  DF_DEVICE void keep(int64_t first, const Quad<T> (&noisy)[kCodes]) const {
#pragma unroll
    for (int c = 0; c < kCodes; ++c) {
      const int64_t code = first + c * kSweepSlices;
      if (code < kept_) kept_codes_[code * kSweepQuads + place_.quad] = noisy[c];
    }
  }

  const GumbelForward<S>& p_;
  const GumbelShape& s_;
  const int64_t kept_;
  Quad<T>* const kept_codes_;
  const T inverse_tau_;
  const SweepPlace place_;
  const QuadGrid<const S> logits_grid_;
  const QuadGrid<S> y_grid_;
  const QuadNoise noise_;
};

template <typename S, bool short_cut>
__global__ void __launch_bounds__(kSweepThreads) forward_kernel(GumbelForward<S> p, int64_t kept) {
  using T = Arithmetic<S>;
  DF_SHARED(shared);
  __shared__ RunningSums<T> parts[kSweepWarps][kSweepPixels];
  __shared__ Found<T> found;
  const Forward<S, short_cut> forward(p, kept, reinterpret_cast<Quad<T>*>(shared));
  constexpr RunningSums<T> kNone = RunningSums<T>::none();
  Quad<RunningSums<T>> sums{{kNone, kNone, kNone, kNone}};
  T reference[kQuad];
  forward.sum(sums, reference);
  forward.pick(sums, parts, found);
  __syncthreads();
  forward.store(found, reference);
}

}  // namespace

template <typename S>
cudaError_t launch_gumbel_softmax_forward(const GumbelForward<S>& params, cudaStream_t stream) {
  const cudaError_t error = with_short_cut(params.shape, [&](auto short_cut) {
    const int64_t codes = params.hard ? 0 : params.shape.codes;  // one-hots need no second look
    return launch_sweeps(forward_kernel<S, short_cut.value>, params, codes, sizeof(Arithmetic<S>), stream);
  });
  if (error != cudaSuccess) return error;
  return launch_sum_kl(params.shape, params.stats, params.kl, stream);
}

template cudaError_t launch_gumbel_softmax_forward(const GumbelForward<float>&, cudaStream_t);
template cudaError_t launch_gumbel_softmax_forward(const GumbelForward<double>&, cudaStream_t);
template cudaError_t launch_gumbel_softmax_forward(const GumbelForward<BFloat16>&, cudaStream_t);
template cudaError_t launch_gumbel_softmax_forward(const GumbelForward<Half>&, cudaStream_t);

}  // namespace dalle_fast
