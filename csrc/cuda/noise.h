// Philox noise in kernels. Arrays are indexed by constants only, so that they stay in registers.
#pragma once

#include "common/rng.h"
#include "cuda/device.h"

namespace dalle_fast {

constexpr int kQuad = 4;  // elements that one block of Philox yields

template <typename T>
struct alignas(kQuad * sizeof(T) < 16 ? kQuad * sizeof(T) : 16) Quad {
  T at[kQuad];
};

// Logarithm of a positive, normal x, to 4e-7 plus rounding. The special function unit is that precise near 1 only.
DF_DEVICE float log_of(float x) {
  const int exponent = (__float_as_int(x) - 0x3F3504F3) >> 23;  // such that the mantissa lies in [sqrt(1/2), sqrt(2))
  const float mantissa = __int_as_float(__float_as_int(x) - exponent * (1 << 23));
  return static_cast<float>(exponent) * kLn2 + __logf(mantissa);
}
DF_DEVICE double log_of(double x) { return log(x); }

// Large noise comes from -log(u) near u = 1: there that logarithm must be exact to its last places.
DF_DEVICE float exponential_from_word(uint32_t word) { return -logf(uniform_from_word(word)); }
DF_DEVICE float gumbel_from_word(uint32_t word) { return -log_of(exponential_from_word(word)); }

// The words of elements `first` ... `first` + 3.
DF_DEVICE Quad<uint32_t> quad_words(uint64_t seed, uint64_t first) {
  const PhiloxWords drawn = philox(seed, first / kQuad);
  uint32_t words[2 * kQuad] = {drawn.word[0], drawn.word[1], drawn.word[2], drawn.word[3]};
  if (first % kQuad != 0) {
    const PhiloxWords next = philox(seed, first / kQuad + 1);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) words[kQuad + i] = next.word[i];
#pragma unroll
    for (int i = 0; i < 2 * kQuad - 1; ++i) words[i] = first & 1 ? words[i + 1] : words[i];
#pragma unroll
    for (int i = 0; i < kQuad; ++i) words[i] = first & 2 ? words[i + 2] : words[i];
  }
  return {{words[0], words[1], words[2], words[3]}};
}

// The word of one element.
DF_DEVICE uint32_t element_word(uint64_t seed, uint64_t element) {
  const PhiloxWords drawn = philox(seed, element / kQuad);
  const uint32_t low = element & 1 ? drawn.word[1] : drawn.word[0], high = element & 1 ? drawn.word[3] : drawn.word[2];
  return element & 2 ? high : low;
}

}  // namespace dalle_fast
