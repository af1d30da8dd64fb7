// The 16-bit formats to and from float32, rounding to nearest even; NaN stays NaN.
#pragma once

#include <cstring>

#include "common/format.h"
#include "cpu/simd.h"
#include "cpu/vec_math.h"

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

// Without a branch, so that loops vectorise: not all processors with AVX2 have instructions for it.
DF_ALWAYS_INLINE float load_float16(uint16_t bits) {
  const int32_t size = bits & 0x7FFF;
  // The exponent is 112 more in float32. 224 more make infinity and NaN what they are; the factor makes up for it.
  const float normal = float_from_bits((size << 13) + (224 << 23)) * 0x1p-112f;
  const float magnitude = size < 0x0400 ? static_cast<float>(size) * 0x1p-24f : normal;
  return float_from_bits(bits_from_float(magnitude) | static_cast<int32_t>((bits & 0x8000u) << 16));
}

DF_ALWAYS_INLINE uint16_t store_float16(float x) {
  const int32_t bits = bits_from_float(x), size = bits & 0x7FFFFFFF;
  // Denormals: when 0.5 is added, the adder rounds to multiples of 2^-24.
  const int32_t denormal = bits_from_float(float_from_bits(size) + 0.5f) - bits_from_float(0.5f);
  const int32_t normal = ((size + 0xFFF + (size >> 13 & 1)) >> 13) - (112 << 10);
  int32_t half = size < 0x38800000 ? denormal : normal;
  half = half < 0x7C00 ? half : 0x7C00;
  half = size > 0x7F800000 ? 0x7E00 : half;
  return static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
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
  using Stored = uint16_t;
  static DF_ALWAYS_INLINE float load(uint16_t bits) { return load_float16(bits); }
  static DF_ALWAYS_INLINE uint16_t store(float x) { return store_float16(x); }
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
