// Three steps, each parallel over fixed pieces, so that the result does not depend on the number of threads:
//   1. a chunk of kChunk codes at a time: draw the noise, find each pixel's maximum within the chunk, write
//   exponentials
//      relative to it, keep their sums. Logits are read once from memory, in tiles that stay in the cache;
//   2. merge the sums of all chunks, a pixel at a time: statistics, KL, codes, and a factor for each chunk;
//   3. scale the exponentials by their factor.
// The backward has the same shape; it draws the noise again and needs one sum, that of y * dy.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "gumbel.h"
#include "noise.h"
#include "simd.h"
#include "vec_math.h"

namespace dalle_fast {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kChunk = 64;   // codes
constexpr int64_t kTile = 128;   // pixels
constexpr int64_t kPitch = 144;  // elements from a tile's row to the next: an odd number of cache lines

// What a chunk knows of each pixel, [pixels] each.
template <typename T>
struct ChunkSums {
  T* best;            // largest noisy logit; later the factor of step 3
  T* noisy_sum;       // of exp((noisy - best) / tau)
  T* plain_max;       // largest logit
  T* plain_sum;       // of exp(logit - plain_max)
  T* plain_weighted;  // of the same times (logit - plain_max)
  int32_t* code;      // of best
};

template <typename T>
class Sums {
 public:
  Sums(const GumbelShape& shape, int64_t chunks)
      : chunks_(chunks),
        pixels_(shape.pixels),
        values_(shape.batch * chunks * 5 * pixels_),
        codes_(values_.size() / 5) {}

  ChunkSums<T> at(int64_t image, int64_t chunk, int64_t pixel) {
    const int64_t index = image * chunks_ + chunk;
    T* values = values_.data() + index * 5 * pixels_ + pixel;
    return {values,
            values + pixels_,
            values + 2 * pixels_,
            values + 3 * pixels_,
            values + 4 * pixels_,
            codes_.data() + index * pixels_ + pixel};
  }

 private:
  int64_t chunks_, pixels_;
  std::vector<T> values_;
  std::vector<int32_t> codes_;
};

// A tile [codes, kPitch] from or to the grid at `grid`.
template <typename T>
void load_tile(const T* grid, GridStrides strides, int64_t codes, int64_t pixels, T* tile) {
  if (strides.pixel == 1) {
    for (int64_t c = 0; c < codes; ++c) std::copy_n(grid + c * strides.code, pixels, tile + c * kPitch);
    return;
  }
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < codes; ++c) tile[c * kPitch + p] = grid[p * strides.pixel + c];
  }
}

template <typename T>
void store_tile(const T* tile, GridStrides strides, int64_t codes, int64_t pixels, T* grid) {
  if (strides.pixel == 1) {
    for (int64_t c = 0; c < codes; ++c) std::copy_n(tile + c * kPitch, pixels, grid + c * strides.code);
    return;
  }
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < codes; ++c) grid[p * strides.pixel + c] = tile[c * kPitch + p];
  }
}

// Step 1 on a tile: logits in, exponentials of the noisy logits out.
template <typename T>
DF_ALWAYS_INLINE void reduce_tile_body(T* tile, const float* noise, int64_t first_code, int64_t codes, int64_t pixels,
                                       T inverse_tau, ChunkSums<T> sums) {
  // Without __restrict, the compiler gives up on proving that none of these overlap.
  T* __restrict best = sums.best, * __restrict plain_max = sums.plain_max, * __restrict noisy_sum = sums.noisy_sum;
  T* __restrict plain_sum = sums.plain_sum, * __restrict plain_weighted = sums.plain_weighted;
  int32_t* __restrict code = sums.code;
  // Finite, so that a pixel whose logits are all -inf here gives zeros and not NaN.
  std::fill_n(best, pixels, std::numeric_limits<T>::lowest());
  std::fill_n(plain_max, pixels, std::numeric_limits<T>::lowest());
  std::fill_n(code, pixels, static_cast<int32_t>(first_code));
  for (int64_t c = 0; c < codes; ++c) {
    const T* row = tile + c * kPitch;
    const float* noise_row = noise + c * kPitch;
    for (int64_t p = 0; p < pixels; ++p) {
      const T noisy = row[p] + static_cast<T>(noise_row[p]);
      const bool better = noisy > best[p];
      best[p] = better ? noisy : best[p];
      code[p] = better ? static_cast<int32_t>(first_code + c) : code[p];
      plain_max[p] = row[p] > plain_max[p] ? row[p] : plain_max[p];
    }
  }
  std::fill_n(noisy_sum, pixels, T(0));
  std::fill_n(plain_sum, pixels, T(0));
  std::fill_n(plain_weighted, pixels, T(0));
  for (int64_t c = 0; c < codes; ++c) {
    T* __restrict row = tile + c * kPitch;
    const float* __restrict noise_row = noise + c * kPitch;
    for (int64_t p = 0; p < pixels; ++p) {
      const T below = row[p] - plain_max[p];
      const T plain = vec_exp(below);
      plain_sum[p] += plain;
      plain_weighted[p] += plain * below;
    }
    for (int64_t p = 0; p < pixels; ++p) {
      row[p] = vec_exp((row[p] + static_cast<T>(noise_row[p]) - best[p]) * inverse_tau);
      noisy_sum[p] += row[p];
    }
  }
}

void reduce_tile(float* tile, const float* noise, int64_t first_code, int64_t codes, int64_t pixels, float inverse_tau,
                 ChunkSums<float> sums) {
  simd([=]() DF_INLINE_LAMBDA { reduce_tile_body(tile, noise, first_code, codes, pixels, inverse_tau, sums); });
}

void reduce_tile(double* tile, const float* noise, int64_t first_code, int64_t codes, int64_t pixels,
                 double inverse_tau, ChunkSums<double> sums) {
  reduce_tile_body(tile, noise, first_code, codes, pixels, inverse_tau, sums);
}

void noise_tile(const GumbelShape& s, int64_t image, int64_t first_code, int64_t codes, int64_t pixel, int64_t pixels,
                float* noise) {
  for (int64_t c = 0; c < codes; ++c) {
    gumbel_noise_cpu(s.seed, (image * s.codes + first_code + c) * s.pixels + pixel, pixels, noise + c * kPitch);
  }
}

// Calls body(image, chunk, first code, codes, first pixel, pixels) for every tile; a chunk's tiles run on one thread.
template <typename Body>
void for_each_tile(const GumbelShape& s, int64_t chunks, const Body& body) {
  parallel_for(0, s.batch * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / chunks, chunk = task % chunks, code = chunk * kChunk;
      for (int64_t pixel = 0; pixel < s.pixels; pixel += kTile) {
        body(image, chunk, code, std::min(kChunk, s.codes - code), pixel, std::min(kTile, s.pixels - pixel));
      }
    }
  });
}

struct MergedPixel {
  double noisy_lse, plain_lse, kl;
  int64_t code;
};

// Step 2 for one pixel; leaves each chunk's factor in its `best`.
template <typename T>
MergedPixel merge_pixel(Sums<T>& sums, int64_t chunks, int64_t image, int64_t pixel, double log_codes, double tau) {
  T best = std::numeric_limits<T>::lowest(), plain_max = best;
  int64_t code = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const ChunkSums<T> part = sums.at(image, chunk, pixel);
    if (*part.best > best) best = *part.best, code = *part.code;
    plain_max = std::max(plain_max, *part.plain_max);
  }
  double noisy_sum = 0, plain_sum = 0, plain_weighted = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const ChunkSums<T> part = sums.at(image, chunk, pixel);
    const double below = static_cast<double>(*part.plain_max) - plain_max;
    const double plain = vec_exp(static_cast<T>(below)), noisy = vec_exp(static_cast<T>((*part.best - best) / tau));
    plain_sum += plain * *part.plain_sum;
    if (plain > 0) plain_weighted += plain * (*part.plain_weighted + below * *part.plain_sum);
    noisy_sum += noisy * *part.noisy_sum;
    *part.best = static_cast<T>(noisy);
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    T* factor = sums.at(image, chunk, pixel).best;
    *factor = static_cast<T>(*factor / noisy_sum);
  }
  const double log_plain = std::log(plain_sum);
  return {best / tau + std::log(noisy_sum), plain_max + log_plain, log_codes + plain_weighted / plain_sum - log_plain,
          code};
}

template <typename T>
void scale_tile(T* y, GridStrides strides, int64_t codes, int64_t pixels, const T* factor) {
  if (strides.pixel == 1) {
    for (int64_t c = 0; c < codes; ++c) {
      for (int64_t p = 0; p < pixels; ++p) y[c * strides.code + p] *= factor[p];
    }
    return;
  }
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < codes; ++c) y[p * strides.pixel + c] *= factor[p];
  }
}

// The backward's tiles: y from the statistics, and the sums of y * dy into `dot`.
template <typename T>
DF_ALWAYS_INLINE void soft_sample_body(T* tile, const float* noise, const T* dy, int64_t codes, int64_t pixels,
                                       T inverse_tau, const T* noisy_lse, T* dot) {
  std::fill_n(dot, pixels, T(0));
  for (int64_t c = 0; c < codes; ++c) {
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t i = c * kPitch + p;
      tile[i] = vec_exp((tile[i] + static_cast<T>(noise[i])) * inverse_tau - noisy_lse[p]);
      dot[p] += tile[i] * dy[i];
    }
  }
}

void soft_sample(float* tile, const float* noise, const float* dy, int64_t codes, int64_t pixels, float inverse_tau,
                 const float* noisy_lse, float* dot) {
  simd([=]() DF_INLINE_LAMBDA { soft_sample_body(tile, noise, dy, codes, pixels, inverse_tau, noisy_lse, dot); });
}

void soft_sample(double* tile, const float* noise, const double* dy, int64_t codes, int64_t pixels, double inverse_tau,
                 const double* noisy_lse, double* dot) {
  soft_sample_body(tile, noise, dy, codes, pixels, inverse_tau, noisy_lse, dot);
}

template <typename T>
struct PixelStats {
  const T *plain_lse, *kl, *dot;
  T grad_kl, log_codes, inverse_tau;
};

// d logits = y / tau (dy - y.dy) + dkl q (log q + log K - kl); y in `tile`, replaced by the gradient.
template <typename T>
DF_ALWAYS_INLINE void grad_tile_body(T* tile, const T* logits, const T* dy, int64_t codes, int64_t pixels,
                                     PixelStats<T> s) {
  for (int64_t c = 0; c < codes; ++c) {
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t i = c * kPitch + p;
      const T log_q = logits[i] - s.plain_lse[p];
      const T kl_term = vec_exp(log_q) * (log_q + s.log_codes - s.kl[p]);
      tile[i] = tile[i] * s.inverse_tau * (dy[i] - s.dot[p]) + s.grad_kl * kl_term;
    }
  }
}

void grad_tile(float* tile, const float* logits, const float* dy, int64_t codes, int64_t pixels, PixelStats<float> s) {
  simd([=]() DF_INLINE_LAMBDA { grad_tile_body(tile, logits, dy, codes, pixels, s); });
}

void grad_tile(double* tile, const double* logits, const double* dy, int64_t codes, int64_t pixels,
               PixelStats<double> s) {
  grad_tile_body(tile, logits, dy, codes, pixels, s);
}

}  // namespace

template <typename T>
void gumbel_softmax_forward_cpu(const GumbelForward<T>& params) {
  const GumbelShape& s = params.shape;
  const GridStrides strides = params.strides;
  const int64_t chunks = (s.codes + kChunk - 1) / kChunk;
  Sums<T> sums(s, chunks);

  const auto offset = [&](int64_t image, int64_t code, int64_t pixel) {
    return image * s.codes * s.pixels + code * strides.code + pixel * strides.pixel;
  };
  for_each_tile(
      s, chunks, [&](int64_t image, int64_t chunk, int64_t code, int64_t codes, int64_t pixel, int64_t pixels) {
        alignas(64) T tile[kChunk * kPitch];
        alignas(64) float noise[kChunk * kPitch];
        load_tile(params.logits + offset(image, code, pixel), strides, codes, pixels, tile);
        noise_tile(s, image, code, codes, pixel, pixels, noise);
        reduce_tile(tile, noise, code, codes, pixels, static_cast<T>(1 / s.tau), sums.at(image, chunk, pixel));
        if (!params.hard) store_tile(tile, strides, codes, pixels, params.y + offset(image, code, pixel));
      });

  const double log_codes = std::log(static_cast<double>(s.codes));
  parallel_for(0, s.batch * s.pixels, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / s.pixels, pixel = i % s.pixels;
      const MergedPixel merged = merge_pixel(sums, chunks, image, pixel, log_codes, s.tau);
      T* stats = params.stats + image * kGumbelStats * s.pixels + pixel;
      stats[kNoisyLse * s.pixels] = static_cast<T>(merged.noisy_lse);
      stats[kPlainLse * s.pixels] = static_cast<T>(merged.plain_lse);
      stats[kPixelKl * s.pixels] = static_cast<T>(merged.kl);
      params.codes[i] = merged.code;
    }
  });
  for (int64_t image = 0; image < s.batch; ++image) {
    const T* kl = params.stats + (image * kGumbelStats + kPixelKl) * s.pixels;
    double total = 0;
    for (int64_t p = 0; p < s.pixels; ++p) total += kl[p];
    params.kl[image] = static_cast<T>(total);
  }

  if (params.hard) {
    parallel_for(0, s.batch, 1, [&](int64_t begin, int64_t end) {
      std::fill(params.y + begin * s.codes * s.pixels, params.y + end * s.codes * s.pixels, T(0));
      for (int64_t i = begin * s.pixels; i < end * s.pixels; ++i) {
        params.y[offset(i / s.pixels, params.codes[i], i % s.pixels)] = T(1);
      }
    });
    return;
  }
  for_each_tile(
      s, chunks, [&](int64_t image, int64_t chunk, int64_t code, int64_t codes, int64_t pixel, int64_t pixels) {
        scale_tile(params.y + offset(image, code, pixel), strides, codes, pixels, sums.at(image, chunk, pixel).best);
      });
}

template <typename T>
void gumbel_softmax_backward_cpu(const GumbelBackward<T>& params) {
  const GumbelShape& s = params.shape;
  const int64_t chunks = (s.codes + kChunk - 1) / kChunk;
  const T inverse_tau = static_cast<T>(1 / s.tau);
  std::vector<T> dots(s.batch * chunks * s.pixels);  // [batch, chunks, pixels]; the total ends in chunk 0
  const auto dot_at = [&](int64_t image, int64_t chunk, int64_t pixel) {
    return dots.data() + (image * chunks + chunk) * s.pixels + pixel;
  };
  const auto offset = [&](GridStrides strides, int64_t image, int64_t code, int64_t pixel) {
    return image * s.codes * s.pixels + code * strides.code + pixel * strides.pixel;
  };

  for_each_tile(
      s, chunks, [&](int64_t image, int64_t chunk, int64_t code, int64_t codes, int64_t pixel, int64_t pixels) {
        alignas(64) T tile[kChunk * kPitch], dy[kChunk * kPitch];
        alignas(64) float noise[kChunk * kPitch];
        const int64_t at = offset(params.strides, image, code, pixel);
        load_tile(params.logits + at, params.strides, codes, pixels, tile);
        load_tile(params.grad_y + offset(params.dy_strides, image, code, pixel), params.dy_strides, codes, pixels, dy);
        noise_tile(s, image, code, codes, pixel, pixels, noise);
        const T* noisy_lse = params.stats + (image * kGumbelStats + kNoisyLse) * s.pixels + pixel;
        soft_sample(tile, noise, dy, codes, pixels, inverse_tau, noisy_lse, dot_at(image, chunk, pixel));
        store_tile(tile, params.strides, codes, pixels, params.grad_logits + at);
      });

  for (int64_t image = 0; image < s.batch; ++image) {
    T* total = dot_at(image, 0, 0);
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const T* part = dot_at(image, chunk, 0);
      for (int64_t p = 0; p < s.pixels; ++p) total[p] += part[p];
    }
  }

  for_each_tile(s, chunks, [&](int64_t image, int64_t, int64_t code, int64_t codes, int64_t pixel, int64_t pixels) {
    alignas(64) T tile[kChunk * kPitch], logits[kChunk * kPitch], dy[kChunk * kPitch];
    const int64_t at = offset(params.strides, image, code, pixel);
    load_tile<T>(params.grad_logits + at, params.strides, codes, pixels, tile);
    load_tile(params.logits + at, params.strides, codes, pixels, logits);
    load_tile(params.grad_y + offset(params.dy_strides, image, code, pixel), params.dy_strides, codes, pixels, dy);
    const T* stats = params.stats + image * kGumbelStats * s.pixels + pixel;
    const PixelStats<T> pixel_stats{stats + kPlainLse * s.pixels,
                                    stats + kPixelKl * s.pixels,
                                    dot_at(image, 0, pixel),
                                    params.grad_kl[image],
                                    static_cast<T>(std::log(static_cast<double>(s.codes))),
                                    inverse_tau};
    grad_tile(tile, logits, dy, codes, pixels, pixel_stats);
    store_tile(tile, params.strides, codes, pixels, params.grad_logits + at);
  });
}

template void gumbel_softmax_forward_cpu(const GumbelForward<float>&);
template void gumbel_softmax_forward_cpu(const GumbelForward<double>&);
template void gumbel_softmax_backward_cpu(const GumbelBackward<float>&);
template void gumbel_softmax_backward_cpu(const GumbelBackward<double>&);

}  // namespace dalle_fast
