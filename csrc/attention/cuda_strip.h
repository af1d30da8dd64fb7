// A product of a warp in the attention kernels on tensor cores, a strip of 16 rows by a block of 32 columns: the mask
// of its pairs, and the softmax along the rows.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/intrinsics.h"

namespace dalle_fast::attention {

constexpr int kStripTokens = 16, kBlockTokens = 32;  // rows and columns

// Mask of the pairs of a strip and a block.
class StripMask {
 public:
  bool any;

  // A strip of queries: `seen` are the keys of row lane % 16.
  DF_DEVICE static StripMask of_queries(uint32_t seen) {
    StripMask mask(seen, 0xFFFFFFFFu);
    const int g = threadIdx.x % 32 / 4;
    for (int i = 0; i < 2; ++i) mask.rows_[i] = __shfl_sync(kAllLanes, seen, g + 8 * i);
    return mask;
  }

  // A strip of keys: `seen` are those that the query of column `lane` sees.
  DF_DEVICE static StripMask of_keys(uint32_t seen) {
    constexpr uint32_t kRows = (1u << kStripTokens) - 1;
    StripMask mask(seen & kRows, kRows);
    if (mask.all_ || !mask.any) return mask;
    const int g = threadIdx.x % 32 / 4;
    for (int n = 0; n < kBlockTokens / 8; ++n) {
      for (int i = 0; i < 2; ++i) {
        const int column = column_of(n, i);
        const uint32_t keys = __shfl_sync(kAllLanes, seen, column) >> g;
        mask.rows_[0] |= (keys & 1) << column;
        mask.rows_[1] |= (keys >> 8 & 1) << column;
      }
    }
    return mask;
  }

  // Element i of the lane in block n of 8 columns.
  DF_DEVICE static int column_of(int n, int i) { return 8 * n + threadIdx.x % 4 * 2 + i % 2; }

  // Replaces x where neither of the pair sees the other.
  DF_DEVICE void hide(float (&x)[kBlockTokens / 8][4], float replacement) const {
    if (all_) return;
    for (int n = 0; n < kBlockTokens / 8; ++n) {
      for (int i = 0; i < 4; ++i) {
        if ((rows_[i / 2] >> column_of(n, i) & 1) == 0) x[n][i] = replacement;
      }
    }
  }

 private:
  DF_DEVICE StripMask(uint32_t seen, uint32_t everything)
      : any(__any_sync(kAllLanes, seen != 0)), all_(__all_sync(kAllLanes, seen == everything)) {}

  bool all_;
  uint32_t rows_[2] = {0, 0};  // g and g + 8, a bit for each column
};

// The online softmax of a strip of queries: of rows g and g + 8 the largest score and the sum of the lane's weights.
// Scores are in units of log 2: the hardware's exponential is that of 2.
struct StripSoftmax {
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  // Turns scores into weights, and scales `out` and the sum of earlier ones to fit them.
  template <int kColumns>
  DF_DEVICE void add(float (&scores)[kBlockTokens / 8][4], float (&out)[kColumns][4]) {
    float most[2] = {maximum[0], maximum[1]}, shift[2];
    for (const auto& x : scores) {
      for (int i = 0; i < 4; ++i) most[i / 2] = fmaxf(most[i / 2], x[i]);
    }
    for (int i = 0; i < 2; ++i) {
      for (int lanes = 1; lanes < 4; lanes *= 2) most[i] = fmaxf(most[i], __shfl_xor_sync(kAllLanes, most[i], lanes));
      shift[i] = most[i] == -INFINITY ? 0.0f : most[i];  // nothing seen so far
      const float correction = exp2_approximate(maximum[i] - shift[i]);
      maximum[i] = most[i];
      sum[i] *= correction;
      for (auto& x : out) {
        x[2 * i] *= correction;
        x[2 * i + 1] *= correction;
      }
    }
    for (auto& x : scores) {
      for (int i = 0; i < 4; ++i) {
        x[i] = exp2_approximate(x[i] - shift[i / 2]);
        sum[i / 2] += x[i];
      }
    }
  }

  // Sums over all lanes; to be called after the last scores.
  DF_DEVICE void finish() {
    for (float& x : sum) {
      for (int lanes = 1; lanes < 4; lanes *= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
    }
  }
};

}  // namespace dalle_fast::attention
