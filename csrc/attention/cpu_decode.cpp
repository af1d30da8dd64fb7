// With AVX2, eight sums stay in registers: of eight rows, or of four candidates and two registers of channels. A group
// is one register of candidates: the scores of eight rows and eight candidates are a square, transposed before it is
// stored.
#include "attention/cpu_decode.h"

#include "cpu/simd.h"

#ifdef DF_X86
#include <immintrin.h>
#endif

namespace dalle_fast::attention {
namespace {

template <typename T>
void score_portable(CacheRows<T> rows, int channels, const T* query, int64_t query_stride, T* scores) {
  for (int64_t i = 0; i < rows.n; ++i) {
    const T* row = rows.data + rows.offset[i];
    T sum[kDecodeLanes] = {};
    for (int d = 0; d < channels; d += kDecodeLanes) {
      for (int j = 0; j < kDecodeLanes; ++j) sum[j] += row[d + j] * query[(d + j) * query_stride];
    }
    for (int half = kDecodeLanes / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) sum[j] += sum[j + half];
    }
    scores[i] = sum[0];
  }
}

template <typename T>
void add_portable(CacheRows<T> rows, int channels, const T* weights, T* out) {
  for (int64_t i = 0; i < rows.n; ++i) {
    const T* row = rows.data + rows.offset[i];
    for (int d = 0; d < channels; ++d) out[d] += weights[i] * row[d];
  }
}

template <typename T>
void score_group_portable(CacheRows<T> rows, int channels, const T* queries, T* scores, int64_t pitch) {
  for (int c = 0; c < kDecodeLanes; ++c) score_portable(rows, channels, queries + c, kDecodeLanes, scores + c * pitch);
}

template <typename T>
void add_group_portable(CacheRows<T> rows, int channels, const T* weights, int64_t pitch, T* out) {
  for (int c = 0; c < kDecodeLanes; ++c) add_portable(rows, channels, weights + c * pitch, out + c * channels);
}

#ifdef DF_X86
DF_AVX2 void score_avx2(CacheRows<float> rows, int channels, const float* query, float* scores) {
  for (int64_t i = 0; i < rows.n; i += kDecodeLanes) {
    const float* row[kDecodeLanes];
    for (int r = 0; r < kDecodeLanes; ++r) row[r] = rows.data + rows.offset[i + r];
    __m256 sum[kDecodeLanes] = {};
    for (int d = 0; d < channels; d += kDecodeLanes) {
      const __m256 q = _mm256_loadu_ps(query + d);
      for (int r = 0; r < kDecodeLanes; ++r) sum[r] = _mm256_fmadd_ps(_mm256_loadu_ps(row[r] + d), q, sum[r]);
    }
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(sum[0], sum[1]), _mm256_hadd_ps(sum[2], sum[3]));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(sum[4], sum[5]), _mm256_hadd_ps(sum[6], sum[7]));
    _mm256_storeu_ps(scores + i,
                     _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)));
  }
}

// square[r][c] -> out[c * pitch + r]
DF_AVX2 inline void store_transposed(const __m256 (&square)[kDecodeLanes], float* out, int64_t pitch) {
  __m256 pairs[kDecodeLanes], fours[kDecodeLanes];
  for (int r = 0; r < kDecodeLanes; r += 2) {
    pairs[r] = _mm256_unpacklo_ps(square[r], square[r + 1]);
    pairs[r + 1] = _mm256_unpackhi_ps(square[r], square[r + 1]);
  }
  for (int r = 0; r < kDecodeLanes; r += 4) {
    fours[r] = _mm256_shuffle_ps(pairs[r], pairs[r + 2], 0x44);
    fours[r + 1] = _mm256_shuffle_ps(pairs[r], pairs[r + 2], 0xEE);
    fours[r + 2] = _mm256_shuffle_ps(pairs[r + 1], pairs[r + 3], 0x44);
    fours[r + 3] = _mm256_shuffle_ps(pairs[r + 1], pairs[r + 3], 0xEE);
  }
  for (int c = 0; c < kDecodeLanes / 2; ++c) {
    _mm256_storeu_ps(out + c * pitch, _mm256_permute2f128_ps(fours[c], fours[c + 4], 0x20));
    _mm256_storeu_ps(out + (c + 4) * pitch, _mm256_permute2f128_ps(fours[c], fours[c + 4], 0x31));
  }
}

// As in score_avx2, every eighth channel has its own sum, and the sums are added in pairs: the same bits.
DF_AVX2 void score_group_avx2(CacheRows<float> rows, int channels, const float* queries, float* scores, int64_t pitch) {
  for (int64_t i = 0; i < rows.n; i += kDecodeLanes) {
    const float* row[kDecodeLanes];
    for (int r = 0; r < kDecodeLanes; ++r) row[r] = rows.data + rows.offset[i + r];
    __m256 pairs[4][kDecodeLanes];  // sums of 1, 2, 4 and 8 of the eight
#pragma GCC unroll 8
    for (int j = 0; j < kDecodeLanes; ++j) {
      __m256 sum[kDecodeLanes] = {};
      for (int64_t d = j; d < channels; d += kDecodeLanes) {
        const __m256 q = _mm256_loadu_ps(queries + d * kDecodeLanes);
        for (int r = 0; r < kDecodeLanes; ++r) sum[r] = _mm256_fmadd_ps(_mm256_broadcast_ss(row[r] + d), q, sum[r]);
      }
      int level = 0;
      for (int done = j + 1; done % 2 == 0; done /= 2, ++level) {
        for (int r = 0; r < kDecodeLanes; ++r) sum[r] = _mm256_add_ps(pairs[level][r], sum[r]);
      }
      for (int r = 0; r < kDecodeLanes; ++r) pairs[level][r] = sum[r];
    }
    store_transposed(pairs[3], scores + i, pitch);
  }
}

// kCandidates x kRegisters of the sums.
template <int kCandidates, int kRegisters>
DF_AVX2 void add_avx2(CacheRows<float> rows, const float* weights, int64_t pitch, float* out, int64_t out_pitch) {
  __m256 sum[kCandidates][kRegisters];
#pragma GCC unroll 8
  for (int c = 0; c < kCandidates; ++c) {
#pragma GCC unroll 8
    for (int j = 0; j < kRegisters; ++j) sum[c][j] = _mm256_loadu_ps(out + c * out_pitch + j * kDecodeLanes);
  }
  for (int64_t i = 0; i < rows.n; ++i) {
    const float* row = rows.data + rows.offset[i];
    __m256 value[kRegisters];
#pragma GCC unroll 8
    for (int j = 0; j < kRegisters; ++j) value[j] = _mm256_loadu_ps(row + j * kDecodeLanes);
#pragma GCC unroll 8
    for (int c = 0; c < kCandidates; ++c) {
      const __m256 weight = _mm256_broadcast_ss(weights + c * pitch + i);
#pragma GCC unroll 8
      for (int j = 0; j < kRegisters; ++j) sum[c][j] = _mm256_fmadd_ps(weight, value[j], sum[c][j]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < kCandidates; ++c) {
#pragma GCC unroll 8
    for (int j = 0; j < kRegisters; ++j) _mm256_storeu_ps(out + c * out_pitch + j * kDecodeLanes, sum[c][j]);
  }
}

// All channels, kRegisters at a time, then what is left in halves.
template <int kCandidates, int kRegisters>
void add_channels(CacheRows<float> rows, int channels, const float* weights, int64_t pitch, float* out,
                  int64_t out_pitch) {
  constexpr int kStep = kRegisters * kDecodeLanes;
  for (; channels >= kStep; channels -= kStep, rows.data += kStep, out += kStep) {
    add_avx2<kCandidates, kRegisters>(rows, weights, pitch, out, out_pitch);
  }
  if constexpr (kRegisters > 1) {
    if (channels > 0) add_channels<kCandidates, kRegisters / 2>(rows, channels, weights, pitch, out, out_pitch);
  }
}
#endif

bool has_avx2() { return simd_level() >= Simd::kAvx2; }

}  // namespace

void score_rows(CacheRows<float> rows, int channels, const float* query, float* scores) {
#ifdef DF_X86
  if (has_avx2()) return score_avx2(rows, channels, query, scores);
#endif
  score_portable(rows, channels, query, 1, scores);
}
void score_rows(CacheRows<double> rows, int channels, const double* query, double* scores) {
  score_portable(rows, channels, query, 1, scores);
}

void score_rows_of_group(CacheRows<float> rows, int channels, const float* queries, float* scores, int64_t pitch) {
#ifdef DF_X86
  if (has_avx2()) return score_group_avx2(rows, channels, queries, scores, pitch);
#endif
  score_group_portable(rows, channels, queries, scores, pitch);
}
void score_rows_of_group(CacheRows<double> rows, int channels, const double* queries, double* scores, int64_t pitch) {
  score_group_portable(rows, channels, queries, scores, pitch);
}

void add_rows(CacheRows<float> rows, int channels, const float* weights, float* out) {
#ifdef DF_X86
  if (has_avx2()) return add_channels<1, 8>(rows, channels, weights, 0, out, 0);
#endif
  add_portable(rows, channels, weights, out);
}
void add_rows(CacheRows<double> rows, int channels, const double* weights, double* out) {
  add_portable(rows, channels, weights, out);
}

void add_rows_of_group(CacheRows<float> rows, int channels, const float* weights, int64_t pitch, float* out) {
#ifdef DF_X86
  if (has_avx2()) {
    add_channels<4, 2>(rows, channels, weights, pitch, out, channels);
    return add_channels<4, 2>(rows, channels, weights + 4 * pitch, pitch, out + 4 * channels, channels);
  }
#endif
  add_group_portable(rows, channels, weights, pitch, out);
}
void add_rows_of_group(CacheRows<double> rows, int channels, const double* weights, int64_t pitch, double* out) {
  add_group_portable(rows, channels, weights, pitch, out);
}

}  // namespace dalle_fast::attention
