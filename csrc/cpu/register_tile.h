// Vector types of one register, and the tile of a matrix product that the registers hold, for one instruction set:
// included by headers that cpu/each_simd.h compiles.

template <typename T>
struct Register {
  // Aligned as its elements are.
  typedef T Vector __attribute__((vector_size(DF_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Int Ints __attribute__((vector_size(DF_VECTOR_BYTES)));
  static constexpr int kLanes = DF_VECTOR_BYTES / sizeof(T);
};

template <typename T>
using Vector = typename Register<T>::Vector;
template <typename T>
using Ints = typename Register<T>::Ints;
template <typename T>
constexpr int kLanes = Register<T>::kLanes;

constexpr int kVectors = 64 / DF_VECTOR_BYTES;  // of a cache line

template <typename T>
DF_TARGET DF_ALWAYS_INLINE Vector<T>& at(T* p, int i) {
  return reinterpret_cast<Vector<T>*>(p)[i];
}
template <typename T>
DF_TARGET DF_ALWAYS_INLINE const Vector<T>& at(const T* p, int i) {
  return reinterpret_cast<const Vector<T>*>(p)[i];
}

// kRows rows by one cache line of columns, in registers.
template <typename T, int kRows>
struct RegisterTile {
  Vector<T> sum[kRows][kVectors];

  DF_TARGET DF_ALWAYS_INLINE void zero() {
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kVectors; ++i) sum[r][i] = Vector<T>{};
    }
  }
  DF_TARGET DF_ALWAYS_INLINE void load(const T* c, int64_t row) {
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kVectors; ++i) sum[r][i] = at(c + r * row, i);
    }
  }
  DF_TARGET DF_ALWAYS_INLINE void store(T* c, int64_t row) const {
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kVectors; ++i) at(c + r * row, i) = sum[r][i];
    }
  }
  // += a b, where a[r, k] lies at a[r * a_row + k * a_depth] and b[k] at b[k * b_row]. Strides may be constants.
  template <typename Row, typename Depth, typename BRow>
  DF_TARGET DF_ALWAYS_INLINE void add(int64_t depth, const T* a, Row a_row, Depth a_depth, const T* b, BRow b_row) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; ++k) {
      Vector<T> row[kVectors];
      for (int i = 0; i < kVectors; ++i) row[i] = at(b + k * b_row, i);
      for (int r = 0; r < kRows; ++r) {
        const T value = a[r * a_row + k * a_depth];
        for (int i = 0; i < kVectors; ++i) sum[r][i] += value * row[i];
      }
    }
  }
};
