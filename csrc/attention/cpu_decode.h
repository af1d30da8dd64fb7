// Products of the rows of a cache with the queries of one token of each candidate, and sums of such rows. The same bits
// come out for a candidate alone and for one in a group.
#pragma once

#include <cstdint>

namespace dalle_fast::attention {

constexpr int kDecodeLanes = 8;  // channels come in multiples of it, and candidates in groups of as many

// n rows of T, channels side by side, row i at data + offset[i]. Offsets are padded to a multiple of
// kDecodeLanes; the rows of the padding are read, but not used.
template <typename T>
struct CacheRows {
  const T* data;
  const int64_t* offset;
  int64_t n;
};

// scores[i] = query . rows[i]. `scores` is written up to the next multiple of kDecodeLanes.
void score_rows(CacheRows<float> rows, int channels, const float* query, float* scores);
void score_rows(CacheRows<double> rows, int channels, const double* query, double* scores);

// scores[c * pitch + i] = queries[:, c] . rows[i] for the kDecodeLanes candidates c; queries [channels, kDecodeLanes].
void score_rows_of_group(CacheRows<float> rows, int channels, const float* queries, float* scores, int64_t pitch);
void score_rows_of_group(CacheRows<double> rows, int channels, const double* queries, double* scores, int64_t pitch);

// out += the sum of weights[i] * rows[i].
void add_rows(CacheRows<float> rows, int channels, const float* weights, float* out);
void add_rows(CacheRows<double> rows, int channels, const double* weights, double* out);

// out[c * channels ...] += the sum of weights[c * pitch + i] * rows[i] for kDecodeLanes candidates c.
void add_rows_of_group(CacheRows<float> rows, int channels, const float* weights, int64_t pitch, float* out);
void add_rows_of_group(CacheRows<double> rows, int channels, const double* weights, int64_t pitch, double* out);

}  // namespace dalle_fast::attention
