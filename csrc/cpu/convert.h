// Rows of the 16-bit formats to and from float32 or float64, rounding to nearest even; NaN stays NaN.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>

#include "resblock.h"
#include "simd.h"

namespace dalle_fast {

DF_ALWAYS_INLINE float load_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

DF_ALWAYS_INLINE uint16_t store_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

// out[i] = elements first ... first + n of `in`
template <typename T>
DF_ALWAYS_INLINE void load_row(const void* in, Format format, int64_t first, int64_t n, T* out) {
  if (format == Format::kFloat32) {
    std::copy_n(static_cast<const float*>(in) + first, n, out);
  } else if (format == Format::kFloat64) {
    std::copy_n(static_cast<const double*>(in) + first, n, out);
  } else if (format == Format::kBFloat16) {
    const uint16_t* bits = static_cast<const uint16_t*>(in) + first;
    for (int64_t i = 0; i < n; ++i) out[i] = load_bfloat16(bits[i]);
  } else {
    std::copy_n(static_cast<const c10::Half*>(in) + first, n, out);
  }
}

template <typename T>
DF_ALWAYS_INLINE void store_row(const T* in, int64_t n, void* out, Format format, int64_t first) {
  if (format == Format::kFloat32) {
    std::copy_n(in, n, static_cast<float*>(out) + first);
  } else if (format == Format::kFloat64) {
    std::copy_n(in, n, static_cast<double*>(out) + first);
  } else if (format == Format::kBFloat16) {
    uint16_t* bits = static_cast<uint16_t*>(out) + first;
    for (int64_t i = 0; i < n; ++i) bits[i] = store_bfloat16(static_cast<float>(in[i]));
  } else {
    c10::Half* half = static_cast<c10::Half*>(out) + first;
    for (int64_t i = 0; i < n; ++i) half[i] = static_cast<float>(in[i]);
  }
}

}  // namespace dalle_fast
