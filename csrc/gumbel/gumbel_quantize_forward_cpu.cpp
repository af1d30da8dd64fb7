// The relaxed sample multiplied by the codebook, without the sample in memory. A task is kProductPixels pixels of one
// image. It goes through all codes in chunks with running maxima, as attention goes through keys: sums and the product
// so far are rescaled where a maximum grew.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "cpu/simd.h"
#include "cpu/tile_math.h"
#include "cpu/vec_math.h"
#include "gumbel/cpu_passes.h"
#include "gumbel/cpu_product.h"
#include "gumbel/cpu_tile.h"
#include "gumbel/gumbel.h"

namespace dalle_fast {

using namespace gumbel;
using torch::stable::parallel_for;

namespace {

// Sums of kProductPixels pixels over the codes so far.
template <typename T>
struct Running {
  alignas(64) T best[kProductPixels], noisy_sum[kProductPixels], plain_max[kProductPixels], plain_sum[kProductPixels],
      plain_weighted[kProductPixels];
  alignas(64) T old_reference[kProductPixels], old_plain_max[kProductPixels];
  int32_t code[kProductPixels];

  PixelSums<T> sums(bool short_cut) {
    return {best, noisy_sum, plain_max, plain_sum, plain_weighted, code, short_cut ? plain_max : best};
  }
};

// Makes the sums relative to the new maxima; leaves the factor of the earlier sums in old_reference.
template <typename T>
DF_ALWAYS_INLINE void rescale_body(Running<T>* r, const T* reference, bool short_cut, int64_t pixels, T inverse_tau) {
#pragma omp simd
  for (int64_t p = 0; p < pixels; ++p) {
    const T noisy = vec_exp((r->old_reference[p] - reference[p]) * inverse_tau);
    const T below = r->old_plain_max[p] - r->plain_max[p], plain = vec_exp(below);
    r->noisy_sum[p] *= noisy;
    r->best[p] = short_cut ? r->best[p] * noisy : r->best[p];
    r->plain_weighted[p] = plain > 0 ? plain * (r->plain_weighted[p] + below * r->plain_sum[p]) : T(0);
    r->plain_sum[p] *= plain;
    r->old_reference[p] = noisy;
  }
}

template <typename T>
void scale_row(T* row, int64_t n, T factor) {
  simd([=]() DF_INLINE_LAMBDA {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) row[i] *= factor;
  });
}

}  // namespace

template <typename S>
void gumbel_quantize_forward_cpu(const QuantizeForward<S>& params) {
  using T = Arithmetic<S>;
  const GumbelShape& s = params.shape;
  const int64_t channels = params.channels, chunks = chunk_count(s),
                tiles = (s.pixels + kProductPixels - 1) / kProductPixels;
  const T inverse_tau = static_cast<T>(1 / s.tau);
  const Matrix<T> codebook = padded(params.codebook, s.codes, channels);

  parallel_for(0, s.batch * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / tiles, pixel = i % tiles * kProductPixels,
                    pixels = std::min(kProductPixels, s.pixels - pixel);
      alignas(64) T logits_buffer[kTileArea], noisy[kTileArea];
      Running<T> running;
      const PixelSums<T> sums = running.sums(short_cut(s));
      Matrix<T> z(kProductPixels, channels);
      sums.start(pixels, 0);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t code = chunk * kChunkCodes;
        const GumbelTile t{image, chunk, code, std::min(kChunkCodes, s.codes - code), pixel, pixels};
        const TileRows<const T> logits =
            read_tile(params.logits + t.offset(s, params.strides), params.strides, t.codes, pixels, logits_buffer);
        std::copy_n(sums.reference, pixels, running.old_reference);
        std::copy_n(running.plain_max, pixels, running.old_plain_max);
        maxima_tile(s, t, logits, noisy, sums);
        simd([=, r = &running, fast = short_cut(s)]()
                 DF_INLINE_LAMBDA { rescale_body<T>(r, sums.reference, fast, pixels, inverse_tau); });
        exp_tile<T>(s, t, logits, noisy, {noisy, kTilePitch}, sums);
        for (int64_t p = 0; p < pixels; ++p) {
          if (running.old_reference[p] != 1) scale_row(z.at(p), z.row, running.old_reference[p]);
        }
        gemm(pixels, z.row, t.codes, {noisy, 1, kTilePitch}, codebook.at(code), codebook.row, z.at(0), z.row, true);
      }
      for (int64_t p = 0; p < pixels; ++p) {
        const int64_t index = image * s.pixels + pixel + p;
        write_stats<T>(s, sums.reference[p], running.noisy_sum[p], running.plain_max[p], running.plain_sum[p],
                       running.plain_weighted[p], params.stats + image * kGumbelStats * s.pixels, pixel + p);
        params.codes[index] = running.code[p];
        scale_row(z.at(p), channels, 1 / running.noisy_sum[p]);
        std::copy_n(z.at(p), channels, params.soft + index * channels);
        const bool has_best = std::isfinite(1 / running.noisy_sum[p]);  // not so with NaN: z is NaN then
        const T* row = params.hard && has_best ? codebook.at(running.code[p]) : z.at(p);
        S* out = params.z + image * channels * s.pixels + (pixel + p) * params.z_strides.pixel;
        for (int64_t c = 0; c < channels; ++c) out[c * params.z_strides.code] = narrow<S>(row[c]);
      }
    }
  });
  sum_kl(s, params.stats, params.kl);
}

template void gumbel_quantize_forward_cpu(const QuantizeForward<float>&);
template void gumbel_quantize_forward_cpu(const QuantizeForward<double>&);
template void gumbel_quantize_forward_cpu(const QuantizeForward<BFloat16>&);
template void gumbel_quantize_forward_cpu(const QuantizeForward<Half>&);

}  // namespace dalle_fast
