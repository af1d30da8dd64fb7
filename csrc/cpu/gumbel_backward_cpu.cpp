// Two steps, each parallel over fixed pieces: draw the noise again, write y to the place of the gradient and sum
// y * dy over the codes of a chunk; then, with the sums of all chunks added in order, replace y by the gradient.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "gumbel.h"
#include "gumbel_tile.h"
#include "huge_pages.h"
#include "simd.h"
#include "vec_math.h"

namespace dalle_fast {
namespace {

// y of a group of rows from the statistics; adds y * dy to `dot`.
template <int64_t kRows, typename T>
DF_ALWAYS_INLINE void soft_group_body(Rows<const T> logits, const uint32_t* words, Rows<const T> dy, int64_t pixels,
                                      T inverse_tau, const T* noisy_lse, Rows<T> y, T* dot) {
#pragma omp simd
  for (int64_t p = 0; p < pixels; ++p) {
    T sum = dot[p];
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r) {
      const T noisy = logits.data[r * logits.stride + p] + static_cast<T>(gumbel_from_word(words[r * kTile + p]));
      const T value = vec_exp(noisy * inverse_tau - noisy_lse[p]);
      sum += value * dy.data[r * dy.stride + p];
      y.data[r * y.stride + p] = value;
    }
    dot[p] = sum;
  }
}

template <typename T>
struct PixelStats {
  const T *plain_lse, *kl, *dot;
  T grad_kl, log_codes, inverse_tau;
};

// d logits = y / tau (dy - y.dy) + dkl q (log q + log K - kl); y in `grad`, replaced by the gradient.
template <typename T>
DF_ALWAYS_INLINE void grad_row_body(const T* logits, const T* dy, int64_t pixels, PixelStats<T> s, T* grad) {
#pragma omp simd
  for (int64_t p = 0; p < pixels; ++p) {
    const T log_q = logits[p] - s.plain_lse[p];
    const T kl_term = vec_exp(log_q) * (log_q + s.log_codes - s.kl[p]);
    grad[p] = grad[p] * s.inverse_tau * (dy[p] - s.dot[p]) + s.grad_kl * kl_term;
  }
}

}  // namespace

template <typename T>
void gumbel_softmax_backward_cpu(const GumbelBackward<T>& params) {
  const GumbelShape& s = params.shape;
  const int64_t chunks = chunk_count(s);
  const T inverse_tau = static_cast<T>(1 / s.tau);
  const std::unique_ptr<T[]> dots(new T[s.batch * chunks * s.pixels]);  // the total ends in chunk 0
  const auto dot_at = [&](int64_t image, int64_t chunk, int64_t pixel) {
    return dots.get() + (image * chunks + chunk) * s.pixels + pixel;
  };
  advise_huge(params.grad_logits, s.batch * s.codes * s.pixels * sizeof(T));

  for_each_tile(s, [&](GumbelTile t) {
    alignas(64) T logits_buffer[kArea], dy_buffer[kArea], y_buffer[kArea];
    const int64_t at = t.offset(s, params.strides);
    const Rows<const T> logits = read_tile(params.logits + at, params.strides, t.codes, t.pixels, logits_buffer);
    const Rows<const T> dy =
        read_tile(params.grad_y + t.offset(s, params.dy_strides), params.dy_strides, t.codes, t.pixels, dy_buffer);
    const Rows<T> y = tile_to_write(params.grad_logits + at, params.strides, y_buffer);
    const T* noisy_lse = params.stats + (t.image * kGumbelStats + kNoisyLse) * s.pixels + t.pixel;
    T* dot = dot_at(t.image, t.chunk, t.pixel);
    std::fill_n(dot, t.pixels, T(0));
    NoiseGroup noise;
    for_each_group(t.codes, [&](auto count, int64_t row) {
      constexpr int64_t kRows = decltype(count)::value;
      noise.draw(s, t, row, kRows);
      simd([=, words = &noise.words[0]]() DF_INLINE_LAMBDA {
        soft_group_body<kRows, T>(logits.from(row), words, dy.from(row), t.pixels, inverse_tau, noisy_lse, y.from(row),
                                  dot);
      });
    });
    write_tile(y, params.grad_logits + at, params.strides, t.codes, t.pixels);
  });

  for (int64_t image = 0; image < s.batch; ++image) {
    T* total = dot_at(image, 0, 0);
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const T* part = dot_at(image, chunk, 0);
      for (int64_t p = 0; p < s.pixels; ++p) total[p] += part[p];
    }
  }

  for_each_tile_backwards(s, [&](GumbelTile t) {
    alignas(64) T logits_buffer[kArea], dy_buffer[kArea], grad_buffer[kArea];
    const int64_t at = t.offset(s, params.strides);
    const Rows<const T> logits = read_tile(params.logits + at, params.strides, t.codes, t.pixels, logits_buffer);
    const Rows<const T> dy =
        read_tile(params.grad_y + t.offset(s, params.dy_strides), params.dy_strides, t.codes, t.pixels, dy_buffer);
    read_tile<T>(params.grad_logits + at, params.strides, t.codes, t.pixels, grad_buffer);
    const Rows<T> grad = tile_to_write(params.grad_logits + at, params.strides, grad_buffer);
    const T* stats = params.stats + t.image * kGumbelStats * s.pixels + t.pixel;
    const PixelStats<T> pixel_stats{stats + kPlainLse * s.pixels,
                                    stats + kPixelKl * s.pixels,
                                    dot_at(t.image, 0, t.pixel),
                                    params.grad_kl[t.image],
                                    static_cast<T>(std::log(static_cast<double>(s.codes))),
                                    inverse_tau};
    simd([=]() DF_INLINE_LAMBDA {
      for (int64_t c = 0; c < t.codes; ++c) {
        grad_row_body<T>(logits.row(c), dy.row(c), t.pixels, pixel_stats, grad.row(c));
      }
    });
    write_tile(grad, params.grad_logits + at, params.strides, t.codes, t.pixels);
  });
}

template void gumbel_softmax_backward_cpu(const GumbelBackward<float>&);
template void gumbel_softmax_backward_cpu(const GumbelBackward<double>&);

}  // namespace dalle_fast
