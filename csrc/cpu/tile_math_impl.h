// The product of cpu/tile_math.h for one instruction set (cpu/each_simd.h).

#include "cpu/register_tile.h"

template <typename T, int kRows>
DF_TARGET void gemm_rows(int64_t depth, Left<T> a, const T* b, int64_t b_row, T* c, int64_t c_row, bool accumulate) {
  RegisterTile<T, kRows> tile;
  if (accumulate) {
    tile.load(c, c_row);
  } else {
    tile.zero();
  }
  tile.add(depth, a.data, a.row, a.depth, b, b_row);
  tile.store(c, c_row);
}

template <typename T>
constexpr GemmRows<T>* kGemmRows[kTileRows] = {gemm_rows<T, 1>, gemm_rows<T, 2>, gemm_rows<T, 3>,
                                               gemm_rows<T, 4>, gemm_rows<T, 5>, gemm_rows<T, 6>};
