// The 16-bit formats to and from float32, rounding to nearest even; NaN stays NaN.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

#include "format.h"
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

// Elements of a row in a format, as numbers.
template <Format format>
struct Element;
template <>
struct Element<Format::kFloat32> {
  using Stored = float;
  static DF_ALWAYS_INLINE float load(float x) { return x; }
  static DF_ALWAYS_INLINE float store(float x) { return x; }
};
template <>
struct Element<Format::kFloat64> {
  using Stored = double;
  static DF_ALWAYS_INLINE double load(double x) { return x; }
  static DF_ALWAYS_INLINE double store(double x) { return x; }
};
template <>
struct Element<Format::kBFloat16> {
  using Stored = uint16_t;
  static DF_ALWAYS_INLINE float load(uint16_t bits) { return load_bfloat16(bits); }
  static DF_ALWAYS_INLINE uint16_t store(float x) { return store_bfloat16(x); }
};
template <>
struct Element<Format::kFloat16> {
  using Stored = c10::Half;
  static DF_ALWAYS_INLINE float load(c10::Half x) { return x; }
  static DF_ALWAYS_INLINE c10::Half store(float x) { return x; }
};

// Calls body(Element<format>()): a loop inside is compiled for each format.
template <typename Body>
DF_ALWAYS_INLINE void with_element(Format format, const Body& body) {
  switch (format) {
    case Format::kFloat32:
      return body(Element<Format::kFloat32>());
    case Format::kFloat64:
      return body(Element<Format::kFloat64>());
    case Format::kBFloat16:
      return body(Element<Format::kBFloat16>());
    case Format::kFloat16:
      return body(Element<Format::kFloat16>());
  }
}

}  // namespace dalle_fast
