// Grids of logits by quads, four neighbouring pixels at one code: the elements of one block of Philox, and one load
// where pixels lie side by side. Noise, sums and statistics of quads, for all Gumbel kernels.
#pragma once

#include <limits>

#include "common/format.h"
#include "cuda/intrinsics.h"
#include "cuda/noise.h"
#include "gumbel/gumbel.h"

namespace dalle_fast::gumbel {

DF_DEVICE float exp_of(float x) { return exp2_approximate(x * kLog2E); }
DF_DEVICE float ratio_of(float a, float b) { return divide_approximate(a, b); }
DF_DEVICE double exp_of(double x) { return exp(x); }
DF_DEVICE double ratio_of(double a, double b) { return a / b; }

// At tau = 1 there is a short cut. The noise is -log E with E = -log u, so exp(logit + noise) = exp(logit) / E, and the
// KL needs exp(logit) as well: a code takes one exponential, one logarithm and a division instead of two exponentials
// and two logarithms. It is a template argument of the kernels.
template <typename Body>
cudaError_t with_short_cut(const GumbelShape& s, const Body& body) {
  return s.tau == 1 ? body(std::true_type{}) : body(std::false_type{});
}

// Most that a logit may exceed the reference which keeps exponentials in range. Larger ones raise the reference: at the
// first codes, and hardly ever again.
constexpr float kSlack = 16;

// The noise of an image's quads.
class QuadNoise {
 public:
  DF_DEVICE QuadNoise(const GumbelShape& s, int64_t image)
      : seed_(static_cast<uint64_t>(*s.seed)), first_(image * s.codes * s.pixels), pixels_(s.pixels) {}

  template <typename T>
  DF_DEVICE Quad<T> add_to(const Quad<T>& logits, int64_t code, int64_t pixel) const {
    const Quad<uint32_t> drawn = words(code, pixel);
    Quad<T> noisy;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) noisy.at[i] = logits.at[i] + static_cast<T>(gumbel_from_word(drawn.at[i]));
    return noisy;
  }

  // E of the short cut.
  template <typename T>
  DF_DEVICE Quad<T> exponential(int64_t code, int64_t pixel) const {
    const Quad<uint32_t> drawn = words(code, pixel);
    Quad<T> exponential;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) exponential.at[i] = static_cast<T>(exponential_from_word(drawn.at[i]));
    return exponential;
  }

 private:
  DF_DEVICE Quad<uint32_t> words(int64_t code, int64_t pixel) const {
    return quad_words(seed_, static_cast<uint64_t>(first_ + code * pixels_ + pixel));
  }

  uint64_t seed_;
  int64_t first_, pixels_;
};

// An image [codes, pixels] of a grid, by quads. Pixels past the last read as 0 and are not written.
template <typename S>
class QuadGrid {
  using Value = std::remove_const_t<S>;
  using T = Arithmetic<Value>;
  struct alignas(kQuad * sizeof(S)) Packed {
    Value at[kQuad];
  };

 public:
  DF_DEVICE QuadGrid(S* grid, const GumbelShape& s, GridStrides strides, int64_t image)
      : data_(grid + image * s.codes * s.pixels),
        strides_(strides),
        pixels_(s.pixels),
        packed_(strides.pixel == 1 && s.pixels % kQuad == 0 &&
                reinterpret_cast<uintptr_t>(grid) % sizeof(Packed) == 0) {}

  DF_DEVICE Quad<T> load(int64_t code, int64_t pixel) const {
    Quad<T> quad{};
    S* from = data_ + code * strides_.code + pixel * strides_.pixel;
    if (packed_ && pixel < pixels_) {
      const Packed packed = *reinterpret_cast<const Packed*>(from);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) quad.at[i] = widen(packed.at[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        if (pixel + i < pixels_) quad.at[i] = widen(from[i * strides_.pixel]);
      }
    }
    return quad;
  }

  DF_DEVICE void store(int64_t code, int64_t pixel, const Quad<T>& quad) const {
    S* to = data_ + code * strides_.code + pixel * strides_.pixel;
    if (packed_ && pixel < pixels_) {
      Packed packed;
#pragma unroll
      for (int i = 0; i < kQuad; ++i) packed.at[i] = narrow<S>(quad.at[i]);
      *reinterpret_cast<Packed*>(to) = packed;
    } else {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        if (pixel + i < pixels_) to[i * strides_.pixel] = narrow<S>(quad.at[i]);
      }
    }
  }

 private:
  S* data_;
  GridStrides strides_;
  int64_t pixels_;
  bool packed_;
};

// Sums of a pixel's logits over some of the codes.
template <typename T>
struct PlainSums {
  T reference;  // one of them; none is larger by more than kSlack
  T sum;        // of exp(logit - reference)
  T weighted;   // of (logit - reference) exp(logit - reference)

  DF_DEVICE bool too_low_for(T logit) const { return logit > reference + T(kSlack); }

  // Makes the sums relative to a larger logit; returns exp(reference - larger), the factor by which they shrink.
  DF_DEVICE T raise(T larger) {
    const T below = reference - larger, factor = exp_of(below);
    weighted = factor > 0 ? factor * (weighted + below * sum) : T(0);
    sum *= factor;
    reference = larger;
    return factor;
  }

  // Adds a logit that the reference is not too low for; returns exp(logit - reference).
  DF_DEVICE T add(T logit) {
    const T above = logit - reference, weight = exp_of(above);
    sum += weight;
    weighted += weight * above;
    return weight;
  }

  // The noisy logit, from the exp(noisy - reference) that the short cut computes with.
  DF_DEVICE T noisy_of(T ratio) const {
    return ratio > 0 ? reference + log_of(ratio) : std::numeric_limits<T>::lowest();  // 0: all logits are -inf
  }

  DF_DEVICE void merge(PlainSums other) {
    if (other.reference > reference)
      raise(other.reference);
    else
      other.raise(reference);
    sum += other.sum;
    weighted += other.weighted;
  }
};

// The largest noisy logit and its code, the first of equals.
template <typename T>
struct Best {
  T noisy;
  int code;

  DF_DEVICE bool beats(const Best& other) const {
    return noisy > other.noisy || (noisy == other.noisy && code < other.code);
  }
};

// Sums of a pixel over some of the codes.
template <typename T>
struct RunningSums {
  Best<T> best;
  T noisy_sum;  // of exp((noisy - largest) / tau), the largest so far
  PlainSums<T> plain;

  static constexpr DF_DEVICE RunningSums none() {
    // Finite, so that a pixel whose logits are all -inf so far gives zeros and not NaN.
    constexpr T kLowest = std::numeric_limits<T>::lowest();
    return {{kLowest, 0}, 0, {kLowest, 0, 0}};
  }

  // Writes the statistics to pixel `index` of [kGumbelStats, pixels].
  DF_DEVICE void write(const GumbelShape& s, T* stats, int64_t index) const {
    const double sum = plain.sum, log_plain = log(sum), log_codes = log(static_cast<double>(s.codes));
    stats[kNoisyReference * s.pixels + index] = best.noisy;
    stats[kNoisyLogSum * s.pixels + index] = static_cast<T>(log(static_cast<double>(noisy_sum)));
    stats[kPlainLse * s.pixels + index] = static_cast<T>(plain.reference + log_plain);
    stats[kPixelKl * s.pixels + index] = static_cast<T>(log_codes + plain.weighted / sum - log_plain);
  }
};

// Merges sums whose references are their own largest noisy logits.
template <typename T>
struct MergeSums {
  T inverse_tau;

  DF_DEVICE RunningSums<T> operator()(const RunningSums<T>& a, const RunningSums<T>& b) const {
    const bool a_wins = a.best.beats(b.best);
    RunningSums<T> merged = a;
    merged.best = {a_wins ? a.best.noisy : b.best.noisy, a_wins ? a.best.code : b.best.code};
    const T below = (a_wins ? b.best.noisy : a.best.noisy) - merged.best.noisy;
    merged.noisy_sum =
        (a_wins ? a.noisy_sum : b.noisy_sum) + (a_wins ? b.noisy_sum : a.noisy_sum) * exp_of(below * inverse_tau);
    merged.plain.merge(b.plain);
    return merged;
  }
};

// Statistics of a pixel, from the forward for the backward.
template <typename T>
struct ForwardStats {
  T noisy_reference, noisy_log_sum, plain_lse, kl;

  // y of a noisy logit.
  DF_DEVICE T soft(T noisy, T inverse_tau) const {
    return exp_of((noisy - noisy_reference) * inverse_tau - noisy_log_sum);
  }

  // d kl / d logit = q (log q + log K - kl)
  DF_DEVICE T kl_gradient(T logit, T log_codes) const {
    const T log_q = logit - plain_lse;
    return exp_of(log_q) * (log_q + log_codes - kl);
  }
};

// y of a quad; its noise is drawn again.
template <bool short_cut, typename T>
DF_DEVICE Quad<T> soft_quad(const QuadNoise& noise, const Quad<T>& logits, int64_t code, int64_t pixel,
                            const ForwardStats<T> (&stats)[kQuad], T inverse_tau) {
  Quad<T> y = short_cut ? noise.exponential<T>(code, pixel) : noise.add_to(logits, code, pixel);
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    y.at[i] =
        short_cut ? ratio_of(stats[i].soft(logits.at[i], inverse_tau), y.at[i]) : stats[i].soft(y.at[i], inverse_tau);
  }
  return y;
}

template <typename T>
DF_DEVICE ForwardStats<T> load_stats(const GumbelShape& s, const T* stats, int64_t image, int64_t pixel) {
  if (pixel >= s.pixels) return {};
  const T* at = stats + image * kGumbelStats * s.pixels + pixel;
  return {at[kNoisyReference * s.pixels], at[kNoisyLogSum * s.pixels], at[kPlainLse * s.pixels],
          at[kPixelKl * s.pixels]};
}

// kl [B] from the statistics.
template <typename T>
cudaError_t launch_sum_kl(const GumbelShape& shape, const T* stats, T* kl, cudaStream_t stream);

}  // namespace dalle_fast::gumbel
