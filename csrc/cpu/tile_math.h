// Arithmetic on tiles that stay in the cache: matrix products and the rows of a softmax.
#pragma once

#include <cstdint>

namespace dalle_fast {

// Columns of a product come in multiples of this many elements: one cache line.
template <typename T>
constexpr int64_t kColumns = 64 / sizeof(T);

template <typename T>
constexpr int64_t round_to_columns(int64_t n) {
  return (n + kColumns<T> - 1) / kColumns<T> * kColumns<T>;
}

// A matrix [rows, depth] in either order.
template <typename T>
struct Left {
  const T* data;
  int64_t row, depth;  // strides in elements
};

// c[rows, columns] = a[rows, depth] b[depth, columns], or += with `accumulate`. The sum over depth is in order, and
// does not depend on how many rows or columns a call covers. `columns` is rounded up to a multiple of kColumns; b and c
// must have as many.
void gemm(int64_t rows, int64_t columns, int64_t depth, Left<float> a, const float* b, int64_t b_row, float* c,
          int64_t c_row, bool accumulate);
void gemm(int64_t rows, int64_t columns, int64_t depth, Left<double> a, const double* b, int64_t b_row, double* c,
          int64_t c_row, bool accumulate);

// row[i] = exp(row[i] - max), where max is that of the row; returns the new row's sum.
float exp_row(float* row, int64_t n);
double exp_row(double* row, int64_t n);

float dot(const float* a, const float* b, int64_t n);
double dot(const double* a, const double* b, int64_t n);

// y += x * scale
void add_scaled(const float* x, float scale, int64_t n, float* y);
void add_scaled(const double* x, double scale, int64_t n, double* y);

}  // namespace dalle_fast
