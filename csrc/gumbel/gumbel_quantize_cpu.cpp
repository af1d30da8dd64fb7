// The relaxed sample times the codebook, without the sample in memory.
//
// Forward: a task is kPixels pixels of one image. It goes through all codes in chunks with running maxima, as attention
// goes through keys: sums and the product so far are rescaled where a maximum grew.
// Backward: since sum_k y dy = dz . z, one pass does. A task is a chunk of codes over all images and pixels, so that
// the chunk's rows of the codebook's gradient belong to it alone, and their sum has one order.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/simd.h"
#include "cpu/tile_math.h"
#include "cpu/vec_math.h"
#include "gumbel/cpu_passes.h"
#include "gumbel/cpu_tile.h"
#include "gumbel/gumbel.h"

namespace dalle_fast {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kPixels = 192;  // of a tile

// A matrix [rows, columns] in the arithmetic type, rows padded to whole cache lines: the right side of a product.
template <typename T>
struct Matrix {
  int64_t row;  // elements from a row to the next
  std::vector<T> values;

  Matrix(int64_t rows, int64_t columns) : row(round_to_columns<T>(columns)), values(rows * row) {}
  T* at(int64_t index) { return values.data() + index * row; }
  const T* at(int64_t index) const { return values.data() + index * row; }
};

template <typename S, typename T = Arithmetic<S>>
Matrix<T> padded(const S* rows, int64_t count, int64_t columns) {
  Matrix<T> matrix(count, columns);
  parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::transform(rows + i * columns, rows + (i + 1) * columns, matrix.at(i), [](S x) { return widen(x); });
  });
  return matrix;
}

// Sums of kPixels pixels over the codes so far.
template <typename T>
struct Running {
  alignas(64) T best[kPixels], noisy_sum[kPixels], plain_max[kPixels], plain_sum[kPixels], plain_weighted[kPixels];
  alignas(64) T old_reference[kPixels], old_plain_max[kPixels];
  int32_t code[kPixels];

  PixelSums<T> sums(bool short_cut) {
    return {best, noisy_sum, plain_max, plain_sum, plain_weighted, code, short_cut ? plain_max : best};
  }
};

// Makes the sums relative to the new maxima; the factor for what was summed before is left in old_reference.
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
  const int64_t channels = params.channels, chunks = chunk_count(s), tiles = (s.pixels + kPixels - 1) / kPixels;
  const T inverse_tau = static_cast<T>(1 / s.tau);
  const Matrix<T> codebook = padded(params.codebook, s.codes, channels);

  parallel_for(0, s.batch * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / tiles, pixel = i % tiles * kPixels, pixels = std::min(kPixels, s.pixels - pixel);
      alignas(64) T logits_buffer[kArea], noisy[kArea];
      Running<T> running;
      const PixelSums<T> sums = running.sums(short_cut(s));
      Matrix<T> z(kPixels, channels);
      sums.start(pixels, 0);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t code = chunk * kChunk;
        const GumbelTile t{image, chunk, code, std::min(kChunk, s.codes - code), pixel, pixels};
        const Rows<const T> logits =
            read_tile(params.logits + t.offset(s, params.strides), params.strides, t.codes, pixels, logits_buffer);
        std::copy_n(sums.reference, pixels, running.old_reference);
        std::copy_n(running.plain_max, pixels, running.old_plain_max);
        maxima_tile(s, t, logits, noisy, sums);
        simd([=, r = &running, fast = short_cut(s)]()
                 DF_INLINE_LAMBDA { rescale_body<T>(r, sums.reference, fast, pixels, inverse_tau); });
        exp_tile<T>(s, t, logits, noisy, {noisy, kPitch}, sums);
        for (int64_t p = 0; p < pixels; ++p) {
          if (running.old_reference[p] != 1) scale_row(z.at(p), z.row, running.old_reference[p]);
        }
        gemm(pixels, z.row, t.codes, {noisy, 1, kPitch}, codebook.at(code), codebook.row, z.at(0), z.row, true);
      }
      for (int64_t p = 0; p < pixels; ++p) {
        const int64_t index = image * s.pixels + pixel + p;
        write_stats<T>(s, sums.reference[p], running.noisy_sum[p], running.plain_max[p], running.plain_sum[p],
                       running.plain_weighted[p], params.stats + image * kGumbelStats * s.pixels, pixel + p);
        params.codes[index] = running.code[p];
        scale_row(z.at(p), channels, 1 / running.noisy_sum[p]);
        std::copy_n(z.at(p), channels, params.soft + index * channels);
        const T* row = params.hard ? codebook.at(running.code[p]) : z.at(p);
        S* out = params.z + image * channels * s.pixels + (pixel + p) * params.z_strides.pixel;
        for (int64_t c = 0; c < channels; ++c) out[c * params.z_strides.code] = narrow<S>(row[c]);
      }
    }
  });
  sum_kl(s, params.stats, params.kl);
}

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
    Matrix<T> grad_codebook(kChunk, channels);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first_code = chunk * kChunk, chunk_codes = std::min(kChunk, s.codes - first_code);
      std::fill(grad_codebook.values.begin(), grad_codebook.values.end(), T(0));
      for (int64_t image = 0; image < s.batch; ++image) {
        for_each_tile_of_chunk(s, image, chunk, kPixels, [&](const GumbelTile& t) {
          alignas(64) T logits_buffer[kArea], grad_buffer[kArea], dy[kArea];
          const int64_t at = t.offset(s, params.strides), index = image * s.pixels + t.pixel;
          const Rows<const T> logits = read_tile(params.logits + at, params.strides, t.codes, t.pixels, logits_buffer);
          const Rows<T> grad = tile_to_write(params.grad_logits + at, params.strides, grad_buffer);
          soft_tile(s, t, logits, params.stats, grad);
          gemm(t.codes, round_to_columns<T>(t.pixels), channels, {codebook.at(t.code), codebook.row, 1},
               dz_by_channel.at(image * channels) + t.pixel, dz_by_channel.row, dy, kPitch, false);
          if (!params.hard) {
            gemm(t.codes, dz.row, t.pixels, {grad.data, grad.stride, 1}, dz.at(index), dz.row, grad_codebook.at(0),
                 grad_codebook.row, true);
          }
          grad_tile<T>(s, t, logits, {dy, kPitch}, dots.data() + index, params.grad_kl[image], params.stats, grad);
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

template void gumbel_quantize_forward_cpu(const QuantizeForward<float>&);
template void gumbel_quantize_forward_cpu(const QuantizeForward<double>&);
template void gumbel_quantize_forward_cpu(const QuantizeForward<BFloat16>&);
template void gumbel_quantize_forward_cpu(const QuantizeForward<Half>&);
template void gumbel_quantize_backward_cpu(const QuantizeBackward<float>&);
template void gumbel_quantize_backward_cpu(const QuantizeBackward<double>&);
template void gumbel_quantize_backward_cpu(const QuantizeBackward<BFloat16>&);
template void gumbel_quantize_backward_cpu(const QuantizeBackward<Half>&);

}  // namespace dalle_fast
