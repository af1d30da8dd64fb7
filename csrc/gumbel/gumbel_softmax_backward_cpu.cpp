// Two steps, each parallel over fixed pieces: draw the noise again, write y where the gradient will be and sum y * dy
// over the codes of a chunk; then, with the sums of all chunks added in order, replace y by the gradient. y in 16 bits
// would be rounded twice: there, the second step draws the noise once more.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "cpu/huge_pages.h"
#include "cpu/simd.h"
#include "gumbel/cpu_passes.h"
#include "gumbel/cpu_tile.h"
#include "gumbel/gumbel.h"

namespace dalle_fast {

using namespace gumbel;

namespace {

template <typename T>
DF_ALWAYS_INLINE void dot_row_body(const T* y, const T* dy, int64_t pixels, T* dot) {
#pragma omp simd
  for (int64_t p = 0; p < pixels; ++p) dot[p] += y[p] * dy[p];
}

}  // namespace

template <typename S>
void gumbel_softmax_backward_cpu(const GumbelBackward<S>& params) {
  using T = Arithmetic<S>;
  constexpr bool kExact = std::is_same_v<S, T>;
  const GumbelShape& s = params.shape;
  const int64_t chunks = chunk_count(s);
  const std::unique_ptr<T[]> dots(new T[s.batch * chunks * s.pixels]);  // the total ends in chunk 0
  const auto dot_at = [&](int64_t image, int64_t chunk, int64_t pixel) {
    return dots.get() + (image * chunks + chunk) * s.pixels + pixel;
  };
  const auto read = [&](const GumbelTile& t, const S* grid, GridStrides strides, T* buffer) {
    return read_tile(grid + t.offset(s, strides), strides, t.codes, t.pixels, buffer);
  };
  advise_huge(params.grad_logits, s.batch * s.codes * s.pixels * sizeof(S));

  for_each_tile(s, [&](GumbelTile t) {
    alignas(64) T logits_buffer[kTileArea], dy_buffer[kTileArea], y_buffer[kTileArea];
    S* grad_at = params.grad_logits + t.offset(s, params.strides);
    const TileRows<const T> logits = read(t, params.logits, params.strides, logits_buffer);
    const TileRows<const T> dy = read(t, params.grad_y, params.dy_strides, dy_buffer);
    const TileRows<T> y = kExact ? tile_to_write(grad_at, params.strides, y_buffer) : TileRows<T>{y_buffer, kTilePitch};
    soft_tile(s, t, logits, params.stats, y);
    T* dot = dot_at(t.image, t.chunk, t.pixel);
    std::fill_n(dot, t.pixels, T(0));
    simd([=, codes = t.codes, pixels = t.pixels]() DF_INLINE_LAMBDA {
      for (int64_t c = 0; c < codes; ++c) dot_row_body<T>(y.row(c), dy.row(c), pixels, dot);
    });
    if (kExact) write_tile(y, grad_at, params.strides, t.codes, t.pixels);
  });

  for (int64_t image = 0; image < s.batch; ++image) {
    T* total = dot_at(image, 0, 0);
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const T* part = dot_at(image, chunk, 0);
      for (int64_t p = 0; p < s.pixels; ++p) total[p] += part[p];
    }
  }

  for_each_tile_backwards(s, [&](GumbelTile t) {
    alignas(64) T logits_buffer[kTileArea], dy_buffer[kTileArea], grad_buffer[kTileArea];
    S* grad_at = params.grad_logits + t.offset(s, params.strides);
    const TileRows<const T> logits = read(t, params.logits, params.strides, logits_buffer);
    const TileRows<const T> dy = read(t, params.grad_y, params.dy_strides, dy_buffer);
    const TileRows<T> grad = tile_to_write(grad_at, params.strides, grad_buffer);
    if constexpr (kExact) {
      read_tile<S>(grad_at, params.strides, t.codes, t.pixels, grad_buffer);
    } else {
      soft_tile(s, t, logits, params.stats, grad);
    }
    grad_tile(s, t, logits, dy, dot_at(t.image, 0, t.pixel), params.grad_kl[t.image], params.stats, grad);
    write_tile(grad, grad_at, params.strides, t.codes, t.pixels);
  });
}

template void gumbel_softmax_backward_cpu(const GumbelBackward<float>&);
template void gumbel_softmax_backward_cpu(const GumbelBackward<double>&);
template void gumbel_softmax_backward_cpu(const GumbelBackward<BFloat16>&);
template void gumbel_softmax_backward_cpu(const GumbelBackward<Half>&);

}  // namespace dalle_fast
