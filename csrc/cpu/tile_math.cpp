// The product keeps a tile of 6 rows by one cache line of columns in registers (12 of the 16 of AVX2); everything else
// is loops that the compiler vectorises.
#include "cpu/tile_math.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "cpu/simd.h"
#include "cpu/vec_math.h"

namespace dalle_fast {
namespace {

constexpr int kTileRows = 6;

// One tile of the product: a fixed number of rows by one cache line of columns.
template <typename T>
using GemmRows = void(int64_t depth, Left<T> a, const T* b, int64_t b_row, T* c, int64_t c_row, bool accumulate);

#define DF_EACH_SIMD "cpu/tile_math_impl.h"
#include "cpu/each_simd.h"

template <typename T>
void gemm_any(int64_t rows, int64_t columns, int64_t depth, Left<T> a, const T* b, int64_t b_row, T* c, int64_t c_row,
              bool accumulate) {
  GemmRows<T>* const* gemm_rows = DF_BEST(kGemmRows<T>);
  for (int64_t column = 0; column < columns; column += kColumns<T>) {
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int64_t height = std::min<int64_t>(kTileRows, rows - row);
      gemm_rows[height - 1](depth, {a.data + row * a.row, a.row, a.depth}, b + column, b_row, c + row * c_row + column,
                            c_row, accumulate);
    }
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
