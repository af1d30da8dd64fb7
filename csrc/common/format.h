// Formats of tensor elements: as a value, for kernels that choose at run time, and the 16-bit ones as types.
#pragma once

#include <cstdint>

namespace dalle_fast {

enum class Format { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct alignas(2) Half {
  uint16_t bits;
};

struct alignas(2) BFloat16 {
  uint16_t bits;
};

}  // namespace dalle_fast
