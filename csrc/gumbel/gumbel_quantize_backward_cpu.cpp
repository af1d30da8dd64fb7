// Since sum_k y dy = dz . z, one pass over the codes does. A task is a chunk of codes over all images and pixels, so
// that the chunk's rows of the codebook's gradient belong to it alone, and their sum has one order.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/tile_math.h"
#include "gumbel/cpu_passes.h"
#include "gumbel/cpu_product.h"
#include "gumbel/cpu_tile.h"
#include "gumbel/gumbel.h"

namespace dalle_fast {

using namespace gumbel;
using torch::stable::parallel_for;

template <typename S>
void gumbel_quantize_backward_cpu(const QuantizeBackward<S>& params) {
  using T = Arithmetic<S>;
  const GumbelShape& s = params.shape;
  const int64_t channels = params.channels, chunks = chunk_count(s);
  const Matrix<T> codebook = padded(params.codebook, s.codes, channels);
  advise_huge(params.grad_logits, s.batch * s.codes * s.pixels * sizeof(S));

  // dz by pixel for the codebook's gradient, by channel for that of y; and dz . z.
  Matrix<T> dz(s.batch * s.pixels, channels), dz_by_channel(s.batch * channels, s.pixels);
  std::vector<T> dots(s.batch * s.pixels);
  parallel_for(0, s.batch * s.pixels, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / s.pixels, pixel = i % s.pixels;
      const S* in = params.grad_z + image * channels * s.pixels + pixel * params.dz_strides.pixel;
      for (int64_t c = 0; c < channels; ++c) {
        const T value = widen(in[c * params.dz_strides.code]);
        dz.at(i)[c] = value;
        dz_by_channel.at(image * channels + c)[pixel] = value;
      }
      dots[i] = dot(dz.at(i), params.soft + i * channels, channels);
    }
  });

  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Matrix<T> grad_codebook(kChunkCodes, channels);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first_code = chunk * kChunkCodes, chunk_codes = std::min(kChunkCodes, s.codes - first_code);
      std::fill(grad_codebook.values.begin(), grad_codebook.values.end(), T(0));
      for (int64_t image = 0; image < s.batch; ++image) {
        for_each_tile_of_chunk(s, image, chunk, kProductPixels, [&](const GumbelTile& t) {
          alignas(64) T logits_buffer[kTileArea], grad_buffer[kTileArea], dy[kTileArea];
          const int64_t at = t.offset(s, params.strides), index = image * s.pixels + t.pixel;
          const TileRows<const T> logits =
              read_tile(params.logits + at, params.strides, t.codes, t.pixels, logits_buffer);
          const TileRows<T> grad = tile_to_write(params.grad_logits + at, params.strides, grad_buffer);
          soft_tile(s, t, logits, params.stats, grad);
          gemm(t.codes, round_to_columns<T>(t.pixels), channels, {codebook.at(t.code), codebook.row, 1},
               dz_by_channel.at(image * channels) + t.pixel, dz_by_channel.row, dy, kTilePitch, false);
          if (!params.hard) {
            gemm(t.codes, dz.row, t.pixels, {grad.data, grad.stride, 1}, dz.at(index), dz.row, grad_codebook.at(0),
                 grad_codebook.row, true);
          }
          grad_tile<T>(s, t, logits, {dy, kTilePitch}, dots.data() + index, params.grad_kl[image], params.stats, grad);
          write_tile(grad, params.grad_logits + at, params.strides, t.codes, t.pixels);
        });
      }
      if (params.hard) {
        for (int64_t i = 0; i < s.batch * s.pixels; ++i) {
          const int64_t code = params.codes[i] - first_code;
          if (code >= 0 && code < chunk_codes) add_scaled(dz.at(i), T(1), channels, grad_codebook.at(code));
        }
      }
      for (int64_t c = 0; c < chunk_codes; ++c) {
        S* out = params.grad_codebook + (first_code + c) * channels;
        std::transform(grad_codebook.at(c), grad_codebook.at(c) + channels, out, [](T x) { return narrow<S>(x); });
      }
    }
  });
}

template void gumbel_quantize_backward_cpu(const QuantizeBackward<float>&);
template void gumbel_quantize_backward_cpu(const QuantizeBackward<double>&);
template void gumbel_quantize_backward_cpu(const QuantizeBackward<BFloat16>&);
template void gumbel_quantize_backward_cpu(const QuantizeBackward<Half>&);

}  // namespace dalle_fast
