// The kernels of attention/cpu_strip.h for one instruction set (cpu/each_simd.h).

#define DF_KERNEL DF_TARGET static
#define DF_INLINE DF_TARGET DF_ALWAYS_INLINE

#include "cpu/register_tile.h"

template <int64_t n>
using Constant = std::integral_constant<int64_t, n>;

template <typename T>
DF_KERNEL void transpose(const T* from, int64_t from_row, T* to, int64_t to_row) {
  typedef T Short __attribute__((vector_size(16), aligned(alignof(T)), may_alias));
  constexpr int kSize = 16 / sizeof(T);
  for (int i = 0; i < kPanelKeys<T>; i += kSize) {
    for (int j = 0; j < kPanelKeys<T>; j += kSize) {
      Short x[kSize], y[kSize];
      for (int r = 0; r < kSize; ++r) x[r] = *reinterpret_cast<const Short*>(from + (i + r) * from_row + j);
      for (int stage = 1; stage < kSize; stage *= 2) {  // row r meets row r + kSize / 2: a perfect shuffle
        for (int r = 0; r < kSize / 2; ++r) {
          const Short a = x[r], b = x[r + kSize / 2];
          if constexpr (kSize == 4) {
            y[2 * r] = Short{a[0], b[0], a[1], b[1]};
            y[2 * r + 1] = Short{a[2], b[2], a[3], b[3]};
          } else {
            y[2 * r] = Short{a[0], b[0]};
            y[2 * r + 1] = Short{a[1], b[1]};
          }
        }
        std::copy_n(y, kSize, x);
      }
      for (int r = 0; r < kSize; ++r) *reinterpret_cast<Short*>(to + (j + r) * to_row + i) = x[r];
    }
  }
}

template <typename T, typename Width>
DF_INLINE void score_body(Width width, int strips, const T* queries, const T* keys, int64_t keys_row, T* scores,
                          int64_t scores_strip) {
  for (int s = 0; s < strips; ++s) {
    RegisterTile<T, kStripRows> tile;
    tile.zero();
    tile.add(width, queries + s * kStripRows * width, width, Constant<1>(), keys, keys_row);
    tile.store(scores + s * scores_strip, kPanelKeys<T>);
  }
}

template <typename T>
DF_KERNEL void hide(const PanelMask* masks, int count, T* scores) {
  Ints<T> bit[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    for (int lane = 0; lane < kLanes<T>; ++lane) bit[i][lane] = 1 << (i * kLanes<T> + lane);
  }
  const Vector<T> hidden = Vector<T>{} - std::numeric_limits<T>::infinity();
  for (int m = 0; m < count; ++m) {
    T* panel = scores + masks[m].panel * kPanelSize<T>;
    for (int r = 0; r < kStripRows; ++r) {
      const typename Register<T>::Int keep = masks[m].keep[r];
      for (int i = 0; i < kVectors; ++i) {
        Vector<T>& x = at(panel + r * kPanelKeys<T>, i);
        x = (bit[i] & keep) == bit[i] ? x : hidden;
      }
    }
  }
}

// 2^x for x up to 127; 0 where the result would soon be denormal, NaN for NaN.
DF_INLINE Vector<float> exp2_of(Vector<float> x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Vector<float> shifted = x + kRound;
  const Vector<float> r = x - (shifted - kRound);
  // Minimax fit of (2^r - 1) / r for |r| <= 1/2.
  Vector<float> p = r * 0.00132646889f + 0.009671505541f;
  p = p * r + 0.05550733954f;
  p = p * r + 0.2402224243f;
  p = p * r + 0.6931470037f;
  p = p * r + 1.0f;
  const Ints<float> result = reinterpret_cast<Ints<float>>(p) + (reinterpret_cast<Ints<float>>(shifted) << 23);
  const Ints<float> tiny = x < -125.0f;
  return reinterpret_cast<Vector<float>>(result & ~tiny);
}

DF_INLINE Vector<double> exp2_of(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::exp2(x[lane]);
  return x;
}

template <typename T>
DF_INLINE T max_of(Vector<T> x) {
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) x[lane] = x[lane + half] > x[lane] ? x[lane + half] : x[lane];
  }
  return x[0];
}

template <typename T>
DF_INLINE T sum_of(Vector<T> x) {
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) x[lane] += x[lane + half];
  }
  return x[0];
}

template <typename T>
DF_KERNEL void softmax(int panels, T* scores, T* maxima, T* sums) {
  RegisterTile<T, kStripRows> most;
  most.load(scores, kPanelKeys<T>);
  for (int p = 1; p < panels; ++p) {
    for (int r = 0; r < kStripRows; ++r) {
      for (int i = 0; i < kVectors; ++i) {
        const Vector<T> x = at(scores + p * kPanelSize<T> + r * kPanelKeys<T>, i);
        most.sum[r][i] = x > most.sum[r][i] ? x : most.sum[r][i];
      }
    }
  }
  for (int r = 0; r < kStripRows; ++r) {
    Vector<T> x = most.sum[r][0];
    for (int i = 1; i < kVectors; ++i) x = most.sum[r][i] > x ? most.sum[r][i] : x;
    maxima[r] = max_of<T>(x);
  }
  for (int r = 0; r < kStripRows; ++r) {
    T* row = scores + r * kPanelKeys<T>;
    const T max = maxima[r];
    Vector<T> total[kVectors] = {};
    for (int p = 0; p < panels; ++p) {
      for (int i = 0; i < kVectors; ++i) {
        Vector<T>& x = at(row + p * kPanelSize<T>, i);
        x = exp2_of(x - max);
        total[i] += x;
      }
    }
    for (int i = 1; i < kVectors; ++i) total[0] += total[i];
    sums[r] = sum_of<T>(total[0]);
  }
}

template <typename T>
DF_KERNEL void softmax_backward(int panels, T* scores, T* dp, const T* lse, const T* delta) {
  for (int p = 0; p < panels; ++p) {
    for (int r = 0; r < kStripRows; ++r) {
      for (int i = 0; i < kVectors; ++i) {
        Vector<T>& s = at(scores + p * kPanelSize<T> + r * kPanelKeys<T>, i);
        Vector<T>& d = at(dp + p * kPanelSize<T> + r * kPanelKeys<T>, i);
        const Vector<T> weight = exp2_of(s - lse[r]);
        d = weight * (d - delta[r]);
        s = weight;
      }
    }
  }
}

template <typename T, typename Width>
DF_INLINE void weigh_body(Width width, const T* weights, const KeySpan* spans, int count, const T* rows, T* out) {
  constexpr Constant<kPanelKeys<T>> kKeys;
  RegisterTile<T, kStripRows> tile;
  tile.zero();
  for (int i = 0; i < count; ++i) {
    const T* row = rows + spans[i].slot * kKeys;
    int left = spans[i].count;
    for (; left >= kKeys; left -= kKeys) {
      tile.add(kKeys, weights, kKeys, Constant<1>(), row, kKeys);
      weights += kPanelSize<T>;
      row += kKeys * kKeys;
    }
    if (left > 0) {
      tile.add(left, weights, kKeys, Constant<1>(), row, kKeys);
      weights += kPanelSize<T>;
    }
  }
  tile.store(out, width);
}

template <int kRows, typename T, typename Width>
DF_INLINE void accumulate_rows(Width width, int strips, const T* queries, const T* weights, int64_t weights_strip,
                               T* keys, int64_t keys_row) {
  RegisterTile<T, kRows> tile;
  tile.load(keys, keys_row);
  for (int s = 0; s < strips; ++s) {
    tile.add(kStripRows, queries + s * kStripRows * width, Constant<1>(), width, weights + s * weights_strip,
             Constant<kPanelKeys<T>>());
  }
  tile.store(keys, keys_row);
}

template <typename T, typename Width>
DF_INLINE void accumulate_body(Width width, int strips, const T* queries, const T* weights, int64_t weights_strip,
                               T* keys, int64_t keys_row) {
  if (strips == 1) {  // too few rows to pay for tiles of keys: the weights stay in registers instead
    RegisterTile<T, kStripRows> row;
    row.load(weights, kPanelKeys<T>);
    for (int64_t d = 0; d < width; ++d) {
      T* key = keys + d * keys_row;
      Vector<T> sum[kVectors];
      for (int i = 0; i < kVectors; ++i) sum[i] = at(key, i);
      for (int r = 0; r < kStripRows; ++r) {
        const T value = queries[r * width + d];
        for (int i = 0; i < kVectors; ++i) sum[i] += value * row.sum[r][i];
      }
      for (int i = 0; i < kVectors; ++i) at(key, i) = sum[i];
    }
    return;
  }
  static_assert(kStripRows == 6 && kPanelKeys<T> % 8 == 0, "a width is a sum of sixes and at most two fours");
  const int64_t sixes = width - (width % 6 == 0 ? 0 : width % 6 == 2 ? 8 : 4);
  int64_t d = 0;
  for (; d < sixes; d += 6) {
    accumulate_rows<6>(width, strips, queries + d, weights, weights_strip, keys + d * keys_row, keys_row);
  }
  for (; d < width; d += 4) {
    accumulate_rows<4>(width, strips, queries + d, weights, weights_strip, keys + d * keys_row, keys_row);
  }
}

// kWidth: 0 for any.
template <typename T, int64_t kWidth>
struct KernelsOfWidth {
  using Width = std::conditional_t<kWidth == 0, int64_t, Constant<kWidth>>;
  DF_INLINE static Width width_of(int64_t width) {
    if constexpr (kWidth == 0) {
      return width;
    } else {
      return {};
    }
  }
  DF_KERNEL void score(int64_t width, int strips, const T* queries, const T* keys, int64_t keys_row, T* scores,
                       int64_t scores_strip) {
    score_body(width_of(width), strips, queries, keys, keys_row, scores, scores_strip);
  }
  DF_KERNEL void weigh(int64_t width, const T* weights, const KeySpan* spans, int count, const T* rows, T* out) {
    weigh_body(width_of(width), weights, spans, count, rows, out);
  }
  DF_KERNEL void accumulate(int64_t width, int strips, const T* queries, const T* weights, int64_t weights_strip,
                            T* keys, int64_t keys_row) {
    accumulate_body(width_of(width), strips, queries, weights, weights_strip, keys, keys_row);
  }
  static constexpr StripKernels<T> kTable = {transpose<T>,        score, hide<T>,   softmax<T>,
                                             softmax_backward<T>, weigh, accumulate};
};

template <typename T>
StripKernels<T> kernels(int64_t width) {
  switch (width) {
    case 32:
      return KernelsOfWidth<T, 32>::kTable;
    case 64:
      return KernelsOfWidth<T, 64>::kTable;
    case 128:
      return KernelsOfWidth<T, 128>::kTable;
    default:
      return KernelsOfWidth<T, 0>::kTable;
  }
}

#undef DF_KERNEL
#undef DF_INLINE
