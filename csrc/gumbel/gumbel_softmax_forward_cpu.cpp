// Three steps, each parallel over fixed pieces, so that the result does not depend on the number of threads:
//   1. a chunk of codes at a time: draw the noise, find each pixel's maximum within the chunk, write exponentials
//      relative to it, keep their sums. Logits are read once from memory, whole rows in order;
//   2. merge the sums of all chunks in order: statistics, KL, codes, and a factor for each chunk and pixel;
//   3. scale the exponentials by their factor. 16 bits would be rounded twice that way: there, step 1 writes nothing,
//      and step 3 draws the noise again.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "cpu/huge_pages.h"
#include "cpu/simd.h"
#include "cpu/vec_math.h"
#include "gumbel/cpu_passes.h"
#include "gumbel/cpu_tile.h"
#include "gumbel/gumbel.h"

namespace dalle_fast {

using namespace gumbel;

namespace {

using torch::stable::parallel_for;

constexpr int64_t kMergePixels = 64;  // pixels merged together

template <typename T>
class Sums {
 public:
  explicit Sums(const GumbelShape& shape)
      : short_cut_(short_cut(shape)),
        chunks_(chunk_count(shape)),
        pixels_(shape.pixels),
        values_(new T[shape.batch * chunks_ * 5 * pixels_]),
        codes_(new int32_t[shape.batch * chunks_ * pixels_]) {}

  PixelSums<T> at(int64_t image, int64_t chunk, int64_t pixel) const {
    const int64_t index = image * chunks_ + chunk;
    T* values = values_.get() + index * 5 * pixels_ + pixel;
    return {values,
            values + pixels_,
            values + 2 * pixels_,
            values + 3 * pixels_,
            values + 4 * pixels_,
            codes_.get() + index * pixels_ + pixel,
            short_cut_ ? values + 2 * pixels_ : values};
  }

 private:
  bool short_cut_;
  int64_t chunks_, pixels_;
  std::unique_ptr<T[]> values_;
  std::unique_ptr<int32_t[]> codes_;
};

// The sums of all chunks, for kMergePixels pixels.
template <typename T>
struct Merged {
  T best[kMergePixels], plain_max[kMergePixels];
  int32_t code[kMergePixels];
  double noisy_sum[kMergePixels], plain_sum[kMergePixels], plain_weighted[kMergePixels];
};

template <typename T>
DF_ALWAYS_INLINE void merge_max_body(PixelSums<T> part, int64_t pixels, Merged<T>* merged) {
#pragma omp simd
  for (int64_t p = 0; p < pixels; ++p) {
    merged->code[p] = part.best[p] > merged->best[p] ? part.code[p] : merged->code[p];
    merged->best[p] = part.best[p] > merged->best[p] ? part.best[p] : merged->best[p];
    merged->plain_max[p] = part.plain_max[p] > merged->plain_max[p] ? part.plain_max[p] : merged->plain_max[p];
  }
}

// Adds a chunk's sums, once the maxima are final; leaves its weight in part.best.
template <typename T>
DF_ALWAYS_INLINE void merge_sums_body(PixelSums<T> part, int64_t pixels, T inverse_tau, Merged<T>* merged) {
#pragma omp simd
  for (int64_t p = 0; p < pixels; ++p) {
    const T below = part.plain_max[p] - merged->plain_max[p];
    const T plain = vec_exp(below), noisy = vec_exp((part.reference[p] - merged->best[p]) * inverse_tau);
    const T weighted = plain > 0 ? plain * (part.plain_weighted[p] + below * part.plain_sum[p]) : T(0);
    merged->plain_sum[p] += static_cast<double>(plain * part.plain_sum[p]);
    merged->plain_weighted[p] += static_cast<double>(weighted);
    merged->noisy_sum[p] += static_cast<double>(noisy * part.noisy_sum[p]);
    part.best[p] = noisy;
  }
}

// Step 2 for up to kMergePixels pixels of an image; leaves each chunk's factor in its `best`.
template <typename S, typename T = Arithmetic<S>>
void merge(const GumbelForward<S>& params, const Sums<T>& sums, int64_t image, int64_t pixel, int64_t pixels) {
  const GumbelShape& s = params.shape;
  const int64_t chunks = chunk_count(s);
  const T inverse_tau = static_cast<T>(1 / s.tau);
  Merged<T> merged{};
  std::fill_n(merged.best, kMergePixels, std::numeric_limits<T>::lowest());
  std::fill_n(merged.plain_max, kMergePixels, std::numeric_limits<T>::lowest());
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    simd([=, part = sums.at(image, chunk, pixel), into = &merged]()
             DF_INLINE_LAMBDA { merge_max_body<T>(part, pixels, into); });
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    simd([=, part = sums.at(image, chunk, pixel), into = &merged]()
             DF_INLINE_LAMBDA { merge_sums_body<T>(part, pixels, inverse_tau, into); });
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    T* factor = sums.at(image, chunk, pixel).best;
    for (int64_t p = 0; p < pixels; ++p) factor[p] = static_cast<T>(factor[p] / merged.noisy_sum[p]);
  }
  T* stats = params.stats + image * kGumbelStats * s.pixels;
  for (int64_t p = 0; p < pixels; ++p) {
    write_stats<T>(s, merged.best[p], merged.noisy_sum[p], merged.plain_max[p], merged.plain_sum[p],
                   merged.plain_weighted[p], stats, pixel + p);
    params.codes[image * s.pixels + pixel + p] = merged.code[p];
  }
}

template <typename T>
DF_ALWAYS_INLINE void scale_tile_body(T* y, GridStrides strides, int64_t codes, int64_t pixels, const T* factor) {
  if (strides.pixel == 1) {
    for (int64_t c = 0; c < codes; ++c) {
#pragma omp simd
      for (int64_t p = 0; p < pixels; ++p) y[c * strides.code + p] *= factor[p];
    }
    return;
  }
  for (int64_t p = 0; p < pixels; ++p) {
#pragma omp simd
    for (int64_t c = 0; c < codes; ++c) y[p * strides.pixel + c] *= factor[p];
  }
}

}  // namespace

template <typename S>
void gumbel_softmax_forward_cpu(const GumbelForward<S>& params) {
  using T = Arithmetic<S>;
  constexpr bool kExact = std::is_same_v<S, T>;
  const GumbelShape& s = params.shape;
  const GridStrides strides = params.strides;
  const Sums<T> sums(s);
  advise_huge(params.y, s.batch * s.codes * s.pixels * sizeof(S));

  for_each_tile(s, [&](GumbelTile t) {
    alignas(64) T logits_buffer[kTileArea], noisy[kTileArea];
    const int64_t at = t.offset(s, strides);
    const PixelSums<T> part = sums.at(t.image, t.chunk, t.pixel);
    const bool keep = kExact && !params.hard;
    const TileRows<const T> logits = read_tile(params.logits + at, strides, t.codes, t.pixels, logits_buffer);
    const TileRows<T> y = keep ? tile_to_write(params.y + at, strides, noisy) : TileRows<T>{noisy, kTilePitch};
    part.start(t.pixels, t.code);
    maxima_tile(s, t, logits, noisy, part);
    exp_tile(s, t, logits, noisy, y, part);
    finish_best(s, t.pixels, part);
    if (keep) write_tile(y, params.y + at, strides, t.codes, t.pixels);
  });

  const int64_t merges = (s.pixels + kMergePixels - 1) / kMergePixels;
  parallel_for(0, s.batch * merges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pixel = i % merges * kMergePixels;
      merge(params, sums, i / merges, pixel, std::min(kMergePixels, s.pixels - pixel));
    }
  });
  sum_kl(s, params.stats, params.kl);

  if (params.hard) {
    parallel_for(0, s.batch, 1, [&](int64_t begin, int64_t end) {
      std::fill(params.y + begin * s.codes * s.pixels, params.y + end * s.codes * s.pixels, S{});
      for (int64_t i = begin * s.pixels; i < end * s.pixels; ++i) {
        const int64_t image = i / s.pixels, pixel = i % s.pixels;
        S* y = params.y + image * s.codes * s.pixels + pixel * strides.pixel;
        if (std::isfinite(params.stats[(image * kGumbelStats + kNoisyLogSum) * s.pixels + pixel])) {
          y[params.codes[i] * strides.code] = narrow<S>(T(1));
        } else {  // as the soft sample
          for (int64_t c = 0; c < s.codes; ++c) y[c * strides.code] = narrow<S>(std::numeric_limits<T>::quiet_NaN());
        }
      }
    });
  } else if constexpr (kExact) {
    for_each_tile_backwards(s, [&](GumbelTile t) {
      simd([=, y = params.y + t.offset(s, strides), factor = sums.at(t.image, t.chunk, t.pixel).best]()
               DF_INLINE_LAMBDA { scale_tile_body<T>(y, strides, t.codes, t.pixels, factor); });
    });
  } else {
    for_each_tile_backwards(s, [&](GumbelTile t) {
      alignas(64) T logits_buffer[kTileArea], y_buffer[kTileArea];
      const int64_t at = t.offset(s, strides);
      const TileRows<const T> logits = read_tile(params.logits + at, strides, t.codes, t.pixels, logits_buffer);
      const TileRows<T> y{y_buffer, kTilePitch};
      soft_tile(s, t, logits, params.stats, y);
      write_tile(y, params.y + at, strides, t.codes, t.pixels);
    });
  }
}

template void gumbel_softmax_forward_cpu(const GumbelForward<float>&);
template void gumbel_softmax_forward_cpu(const GumbelForward<double>&);
template void gumbel_softmax_forward_cpu(const GumbelForward<BFloat16>&);
template void gumbel_softmax_forward_cpu(const GumbelForward<Half>&);

}  // namespace dalle_fast
