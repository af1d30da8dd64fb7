// The two sweeps of gumbel_softmax, forward and backward. A block owns eight pixels of an image and all their codes,
// and goes over these twice; neither sweep accumulates in memory.
//
// Noise costs more than memory does, so the first sweep leaves what it made (noisy logits, in the short cut
// exponentials of them, or y) in shared memory: 7,000 codes in float32 on sm_90. The second sweep draws again only for
// the codes beyond. It runs from the last code to the first, since what was read last is still in the L2 cache: in
// float32 the 256 KB of logits that each of 132 blocks is working on take 35 MB of it. So y costs one read and one
// write of memory.
#pragma once

#include "cuda/intrinsics.h"
#include "cuda/reduce.h"
#include "gumbel/cuda_quad.h"

namespace dalle_fast::gumbel {

constexpr int kSweepThreads = 512;
constexpr int kSweepWarps = kSweepThreads / kWarp;
constexpr int kSweepQuads = 2;  // of a block
constexpr int kSweepPixels = kSweepQuads * kQuad;
constexpr int kSweepSlices = kSweepThreads / kSweepQuads;  // threads that share the codes of a quad
constexpr int kSweepStaticShared = 8 * 1024;               // bytes, more than the kernels declare

// Codes that a thread has in flight.
template <typename T>
constexpr int kSweepCodes = sizeof(T) == 4 ? 4 : 1;

// Place of a thread: neighbouring lanes read neighbouring memory.
struct SweepPlace {
  bool pixels_first;  // NCHW: lanes alternate between the quads; else a warp has one of them
  int quad, slice;
  int64_t image, pixel;  // of the block; its first
  int64_t my_pixel;

  DF_DEVICE SweepPlace(const GumbelShape& s, GridStrides strides) : pixels_first(strides.pixel == 1) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    quad = (pixels_first ? lane : warp) % kSweepQuads;
    slice = pixels_first ? threadIdx.x / kSweepQuads : warp / kSweepQuads * kWarp + lane;
    const int64_t tiles = (s.pixels + kSweepPixels - 1) / kSweepPixels;
    image = blockIdx.x / tiles;
    pixel = blockIdx.x % tiles * kSweepPixels;
    my_pixel = pixel + quad * kQuad;
  }
};

inline unsigned sweep_blocks(const GumbelShape& s) {
  return static_cast<unsigned>(s.batch * ((s.pixels + kSweepPixels - 1) / kSweepPixels));
}

template <typename V>
DF_DEVICE void swap_if(bool wanted, V& a, V& b) {
  const V old = a;
  if (wanted) a = b, b = old;
}

// Reduces each pixel over all threads: warp p < kSweepPixels returns pixel p. `parts` is shared memory.
template <typename V, typename Op>
DF_DEVICE V reduce_pixels(Quad<V> mine, const SweepPlace& place, V zero, Op op, V (*parts)[kSweepPixels]) {
  static_assert(kSweepQuads == 2 && kSweepWarps <= kWarp && kSweepPixels <= kSweepWarps);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  // Two lanes share the four pixels: each gives the other one half. They do so once more, and have one left.
  const bool upper = lane & 16, odd = lane & 8;
  V(&x)[kQuad] = mine.at;
  swap_if(upper, x[0], x[2]);
  swap_if(upper, x[1], x[3]);
  x[0] = op(x[0], shuffle_xor(x[2], 16));
  x[1] = op(x[1], shuffle_xor(x[3], 16));
  swap_if(odd, x[0], x[1]);
  V one = op(x[0], shuffle_xor(x[1], 8));
  one = op(one, shuffle_xor(one, 4));
  one = op(one, shuffle_xor(one, 2));
  if (!place.pixels_first) one = op(one, shuffle_xor(one, 1));
  if ((lane & (place.pixels_first ? 6 : 7)) == 0) {
    parts[place.pixels_first ? warp : warp / kSweepQuads][place.quad * kQuad + 2 * upper + odd] = one;
  }
  __syncthreads();
  const int count = place.pixels_first ? kSweepWarps : kSweepWarps / kSweepQuads;
  return warp_reduce(warp < kSweepPixels && lane < count ? parts[lane][warp] : zero, op);
}

// Calls body(first code of a batch) for the thread's codes, which lie kSweepSlices apart, batch by batch.
template <int batch, bool backwards, typename Body>
DF_DEVICE void for_each_batch_of_codes(int64_t codes, int slice, const Body& body) {
  constexpr int64_t kStep = int64_t{batch} * kSweepSlices;
  const int64_t batches = (codes + kStep - 1) / kStep;
  for (int64_t b = 0; b < batches; ++b) body((backwards ? batches - 1 - b : b) * kStep + slice);
}

// Launches kernel(params, kept): of `codes`, as many are kept as shared memory holds.
template <typename Kernel, typename Params>
cudaError_t launch_sweeps(Kernel kernel, const Params& params, int64_t codes, size_t element_bytes,
                          cudaStream_t stream) {
  int shared_bytes;
  const cudaError_t error = max_shared_bytes(&shared_bytes);
  if (error != cudaSuccess) return error;
  const int64_t code_bytes = kSweepPixels * element_bytes, room = (shared_bytes - kSweepStaticShared) / code_bytes;
  const int64_t kept = codes < room ? codes : room;
  return launch(kernel, sweep_blocks(params.shape), kSweepThreads, kept * code_bytes, stream, params, kept);
}

}  // namespace dalle_fast::gumbel
