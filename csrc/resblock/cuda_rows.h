// Rows of the residual stream in the registers of a block, for residual_layer_norm and its backward.
//
// A block takes one row at a time, a persistent grid takes all. Each warp has a piece of the row, kChunks chunks of
// kVec neighbouring elements per lane. A layout says whether a block so holds the whole row (ResidentRows: float32,
// aligned to 16 bytes, widths of whole chunks up to 8,192) or one strip of it after another, read again in each pass
// (StripRows: every width and type).
#pragma once

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "common/format.h"
#include "cuda/device.h"
#include "cuda/reduce.h"

namespace dalle_fast::resblock {

constexpr int kMaxRowThreads = 512;  // of a block: 128 registers each
constexpr int kMaxRowWarps = kMaxRowThreads / kWarp;

struct ResidentRows {
  static constexpr bool kResident = true;
  static constexpr int kVec = 4, kChunks = 4;
};

struct StripRows {
  static constexpr bool kResident = false;
  static constexpr int kVec = 1, kChunks = 4;
};

// The part of a row or strip that a thread holds.
template <typename T, typename Layout>
using RowPiece = T[Layout::kChunks][Layout::kVec];

// Elements that a thread holds.
template <typename Layout>
constexpr int kThreadElements = Layout::kChunks * Layout::kVec;

// True if ResidentRows takes rows of this width in these tensors.
template <typename T>
bool fits_resident(int64_t width, std::initializer_list<const void*> pointers) {
  bool fits =
      sizeof(T) == 4 && width % ResidentRows::kVec == 0 && width <= kMaxRowThreads * kThreadElements<ResidentRows>;
  for (const void* pointer : pointers) fits = fits && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  return fits;
}

// Threads of a block, whole warps.
template <typename Layout>
int row_threads(int64_t width) {
  const int64_t warps = (width + kThreadElements<Layout> * kWarp - 1) / (kThreadElements<Layout> * kWarp);
  return static_cast<int>(warps < kMaxRowWarps ? warps : kMaxRowWarps) * kWarp;
}

// Calls body(first element of the strip) once, or for every strip of a row.
template <typename Layout, typename Body>
DF_DEVICE void for_each_strip(int64_t width, const Body& body) {
  if constexpr (Layout::kResident) {
    body(0);
  } else {
    const int64_t step = static_cast<int64_t>(blockDim.x) * kThreadElements<Layout>;
    for (int64_t first = 0; first < width; first += step) body(first);
  }
}

// Calls body(c, first element of the row's chunk) for the thread's chunks of a strip.
template <typename Layout, typename Body>
DF_DEVICE void for_each_chunk(int64_t width, int64_t strip, const Body& body) {
  constexpr int kLaneStep = Layout::kVec, kChunkStep = kLaneStep * kWarp, kWarpStep = kChunkStep * Layout::kChunks;
  const int64_t mine = strip + threadIdx.x / kWarp * kWarpStep + threadIdx.x % kWarp * kLaneStep;
#pragma unroll
  for (int c = 0; c < Layout::kChunks; ++c) {
    const int64_t first = mine + c * kChunkStep;
    if (first < width) body(c, first);
  }
}

// Type that a chunk is moved as, in one instruction.
template <typename S, int kVec>
using Vector = std::conditional_t<kVec == 1, S, std::conditional_t<sizeof(S) * kVec == 16, uint4, uint2>>;

template <typename S, typename T, int kVec>
DF_DEVICE void load_chunk(const S* from, T (&to)[kVec]) {
  const auto vector = *reinterpret_cast<const Vector<S, kVec>*>(from);
  S chunk[kVec];
  static_assert(sizeof(chunk) == sizeof(vector));
  memcpy(chunk, &vector, sizeof(chunk));
#pragma unroll
  for (int v = 0; v < kVec; ++v) to[v] = widen(chunk[v]);
}

template <typename S, typename T, int kVec>
DF_DEVICE void store_chunk(const T (&from)[kVec], S* to) {
  S chunk[kVec];
#pragma unroll
  for (int v = 0; v < kVec; ++v) chunk[v] = narrow<S>(static_cast<Arithmetic<S>>(from[v]));
  if constexpr (kVec == 1) {
    *to = chunk[0];
  } else {
    Vector<S, kVec> vector;
    memcpy(&vector, chunk, sizeof(chunk));
    __stcg(reinterpret_cast<Vector<S, kVec>*>(to), vector);  // compilers split an ordinary store
  }
}

// Calls body(S()) for the element type S of a resblock's tensor: of 16 bits, or that of the stream, T.
template <typename T, typename Body>
DF_DEVICE void with_branch_format(Format format, const Body& body) {
  with_format(format, [&](auto element) {
    using S = decltype(element);
    if constexpr (sizeof(S) == 2 || std::is_same_v<S, T>) body(element);
  });
}

template <typename T>
DF_DEVICE bool is_finite(T x) {
  return std::fabs(x) <= std::numeric_limits<T>::max();
}

// Replaces each x by its sum over the block, in an order that only blockDim decides. `parts` is shared memory that no
// thread may still read from an earlier call: alternate between two.
template <typename T, int kSums>
DF_DEVICE void sum_over_block(T (&x)[kSums], T (*parts)[kMaxRowWarps]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    x[s] = warp_reduce(x[s], Add());
    if (lane == 0) parts[s][warp] = x[s];
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kSums; ++s) x[s] = warp_reduce(lane < warps ? parts[s][lane] : T(0), Add());
}

}  // namespace dalle_fast::resblock
