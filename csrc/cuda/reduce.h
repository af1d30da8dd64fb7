// Reductions over a warp or a block. Their order is fixed by the number of threads: two runs give the same bits. Not by
// CUB: the emulation runs without a CUDA toolkit.
#pragma once

#include <cstring>

#include "cuda/device.h"

namespace dalle_fast {

// The value of the lane whose index differs in the bits of `bits`. T is any plain struct of 32-bit words.
template <typename T>
DF_DEVICE T shuffle_xor(const T& x, int bits) {
  static_assert(sizeof(T) % sizeof(uint32_t) == 0);
  constexpr int kWords = sizeof(T) / sizeof(uint32_t);
  uint32_t words[kWords];
  memcpy(words, &x, sizeof(T));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_xor_sync(kAllLanes, words[i], bits);
  T other;
  memcpy(&other, words, sizeof(T));
  return other;
}

struct Add {
  template <typename T>
  DF_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};

struct Larger {
  template <typename T>
  DF_DEVICE T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};

// All lanes of the warp get x reduced with op, which is commutative.
template <typename T, typename Op>
DF_DEVICE T warp_reduce(T x, Op op) {
#pragma unroll
  for (int bits = kWarp / 2; bits > 0; bits /= 2) x = op(x, shuffle_xor(x, bits));
  return x;
}

// All threads of the block get x reduced with op. `scratch` is shared memory for one value per warp.
template <int threads, typename T, typename Op>
DF_DEVICE T block_reduce(T x, Op op, T* scratch) {
  x = warp_reduce(x, op);
  __syncthreads();  // the values of the last reduction have been read
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = scratch[0];
#pragma unroll
  for (int warp = 1; warp < threads / kWarp; ++warp) x = op(x, scratch[warp]);
  return x;
}

}  // namespace dalle_fast
