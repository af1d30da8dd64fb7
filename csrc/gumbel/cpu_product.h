// The codebook as the right side of products with tiles.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/format.h"
#include "cpu/tile_math.h"

namespace dalle_fast::gumbel {

constexpr int64_t kProductPixels = 192;  // of a tile

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
  torch::stable::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::transform(rows + i * columns, rows + (i + 1) * columns, matrix.at(i), [](S x) { return widen(x); });
  });
  return matrix;
}

}  // namespace dalle_fast::gumbel
