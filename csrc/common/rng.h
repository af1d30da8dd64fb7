// Philox4x32-10 (Salmon et al., 2011): noise as a pure function of (seed, logical element index), so that every
// backend, thread count and tiling draws the same numbers.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace dalle_fast {

// The words of four consecutive elements: element i owns word[i % 4] of block i / 4.
struct PhiloxWords {
  uint32_t word[4];
};

DF_HOST_DEVICE inline PhiloxWords philox(uint64_t seed, uint64_t block, uint32_t stream = 0) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32), c2 = stream, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Strictly inside (0, 1): 23 bits and a half. With 24 bits the largest value would round to 1.
DF_HOST_DEVICE inline float uniform_from_word(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>(word >> 9)) * 0x1p-23f + 0x1p-24f;  // signed converts faster
}

}  // namespace dalle_fast
