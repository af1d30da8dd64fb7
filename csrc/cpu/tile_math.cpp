// The product keeps a tile of 6 rows by one cache line of columns in registers (12 of the 16 AVX registers); everything
// else is loops that the compiler vectorises.
#include "cpu/tile_math.h"

#include <algorithm>
#include <limits>

#include "cpu/simd.h"
#include "cpu/vec_math.h"

namespace dalle_fast {
namespace {

constexpr int kRows = 6;

// The product of one tile, for any processor.
template <typename T, int kTileRows>
struct PortableTile {
  static void run(int64_t depth, Left<T> a, const T* b, int64_t b_row, T* c, int64_t c_row, bool accumulate) {
    T sum[kTileRows][kColumns<T>] = {};
    if (accumulate) {
      for (int r = 0; r < kTileRows; ++r) std::copy_n(c + r * c_row, kColumns<T>, sum[r]);
    }
    for (int64_t d = 0; d < depth; ++d) {
      for (int r = 0; r < kTileRows; ++r) {
        const T value = a.data[r * a.row + d * a.depth];
        for (int j = 0; j < kColumns<T>; ++j) sum[r][j] += value * b[d * b_row + j];
      }
    }
    for (int r = 0; r < kTileRows; ++r) std::copy_n(sum[r], kColumns<T>, c + r * c_row);
  }
};

#ifdef DF_X86
template <typename T, int kTileRows>
struct Avx2Tile {
  // Half a cache line: a register. Aligned as its elements are, so that any address will do.
  typedef T Vector __attribute__((vector_size(32), aligned(alignof(T)), may_alias));

  DF_AVX2 static void run(int64_t depth, Left<T> a, const T* b, int64_t b_row, T* c, int64_t c_row, bool accumulate) {
    constexpr int64_t kHalf = kColumns<T> / 2;
    Vector low[kTileRows] = {}, high[kTileRows] = {};
    if (accumulate) {
      for (int r = 0; r < kTileRows; ++r) {
        low[r] = *reinterpret_cast<const Vector*>(c + r * c_row);
        high[r] = *reinterpret_cast<const Vector*>(c + r * c_row + kHalf);
      }
    }
    for (int64_t d = 0; d < depth; ++d) {
      const Vector b_low = *reinterpret_cast<const Vector*>(b + d * b_row);
      const Vector b_high = *reinterpret_cast<const Vector*>(b + d * b_row + kHalf);
      for (int r = 0; r < kTileRows; ++r) {
        const T value = a.data[r * a.row + d * a.depth];
        low[r] += value * b_low;
        high[r] += value * b_high;
      }
    }
    for (int r = 0; r < kTileRows; ++r) {
      *reinterpret_cast<Vector*>(c + r * c_row) = low[r];
      *reinterpret_cast<Vector*>(c + r * c_row + kHalf) = high[r];
    }
  }
};
#else
template <typename T, int kTileRows>
using Avx2Tile = PortableTile<T, kTileRows>;
#endif

template <template <typename, int> class Tile, typename T>
void gemm_tiles(int64_t rows, int64_t columns, int64_t depth, Left<T> a, const T* b, int64_t b_row, T* c, int64_t c_row,
                bool accumulate) {
  using Run = void (*)(int64_t, Left<T>, const T*, int64_t, T*, int64_t, bool);
  static constexpr Run kRun[kRows] = {Tile<T, 1>::run, Tile<T, 2>::run, Tile<T, 3>::run,
                                      Tile<T, 4>::run, Tile<T, 5>::run, Tile<T, 6>::run};
  for (int64_t column = 0; column < columns; column += kColumns<T>) {
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t height = std::min<int64_t>(kRows, rows - row);
      kRun[height - 1](depth, {a.data + row * a.row, a.row, a.depth}, b + column, b_row, c + row * c_row + column,
                       c_row, accumulate);
    }
  }
}

template <typename T>
void gemm_any(int64_t rows, int64_t columns, int64_t depth, Left<T> a, const T* b, int64_t b_row, T* c, int64_t c_row,
              bool accumulate) {
  if (simd_level() >= Simd::kAvx2) {
    gemm_tiles<Avx2Tile>(rows, columns, depth, a, b, b_row, c, c_row, accumulate);
  } else {
    gemm_tiles<PortableTile>(rows, columns, depth, a, b, b_row, c, c_row, accumulate);
  }
}

template <typename T>
DF_ALWAYS_INLINE T exp_row_body(T* row, int64_t n) {
  T max = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; ++i) max = row[i] > max ? row[i] : max;
  T total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    row[i] = vec_exp(row[i] - max);
    total += row[i];
  }
  return total;
}

template <typename T>
DF_ALWAYS_INLINE T dot_body(const T* a, const T* b, int64_t n) {
  T total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += a[i] * b[i];
  return total;
}

template <typename T>
DF_ALWAYS_INLINE void add_scaled_body(const T* x, T scale, int64_t n, T* y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] += x[i] * scale;
}

}  // namespace

void gemm(int64_t rows, int64_t columns, int64_t depth, Left<float> a, const float* b, int64_t b_row, float* c,
          int64_t c_row, bool accumulate) {
  gemm_any(rows, columns, depth, a, b, b_row, c, c_row, accumulate);
}

void gemm(int64_t rows, int64_t columns, int64_t depth, Left<double> a, const double* b, int64_t b_row, double* c,
          int64_t c_row, bool accumulate) {
  gemm_any(rows, columns, depth, a, b, b_row, c, c_row, accumulate);
}

float exp_row(float* row, int64_t n) {
  return simd([=]() DF_INLINE_LAMBDA { return exp_row_body(row, n); });
}
double exp_row(double* row, int64_t n) {
  return simd([=]() DF_INLINE_LAMBDA { return exp_row_body(row, n); });
}

float dot(const float* a, const float* b, int64_t n) {
  return simd([=]() DF_INLINE_LAMBDA { return dot_body(a, b, n); });
}
double dot(const double* a, const double* b, int64_t n) {
  return simd([=]() DF_INLINE_LAMBDA { return dot_body(a, b, n); });
}

void add_scaled(const float* x, float scale, int64_t n, float* y) {
  simd([=]() DF_INLINE_LAMBDA { add_scaled_body(x, scale, n, y); });
}
void add_scaled(const double* x, double scale, int64_t n, double* y) {
  simd([=]() DF_INLINE_LAMBDA { add_scaled_body(x, scale, n, y); });
}

}  // namespace dalle_fast
