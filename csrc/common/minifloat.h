// The 16-bit formats of appendix D: exponent bias 60, no denormals, code 0 is zero, rounding half away from zero,
// saturation at the largest value. 1-6-9 has a sign, also of zero; 0-6-10 has none (negative input becomes zero).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace dalle_fast {

enum class Minifloat { k1_6_9, k0_6_10 };

template <Minifloat format>
DF_HOST_DEVICE inline uint16_t minifloat_encode(float x) {
  constexpr bool kSigned = format == Minifloat::k1_6_9;
  constexpr int kMantissaBits = kSigned ? 9 : 10;
  constexpr int kShift = 23 - kMantissaBits;
  constexpr int32_t kLargest = (1 << (kMantissaBits + 6)) - 1;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t size = bits & 0x7FFFFFFFu;
  // Adding half a step rounds away and carries into the exponent. Infinity and NaN land above the largest code.
  int32_t code = static_cast<int32_t>((size + (1u << (kShift - 1))) >> kShift) - ((127 - 60) << kMantissaBits);
  code = code < 0 ? 0 : code;
  code = code > kLargest ? kLargest : code;
  const uint32_t sign = size <= 0x7F800000u ? bits >> 31 : 0;  // NaN counts as positive
  if (kSigned) return static_cast<uint16_t>(sign << 15 | static_cast<uint32_t>(code));
  return static_cast<uint16_t>(sign != 0 ? 0 : code);
}

template <Minifloat format>
DF_HOST_DEVICE inline float minifloat_decode(uint16_t code) {
  constexpr bool kSigned = format == Minifloat::k1_6_9;
  constexpr int kMantissaBits = kSigned ? 9 : 10;
  const uint32_t size = code & ((1u << (kMantissaBits + 6)) - 1);
  uint32_t bits = size == 0 ? 0 : (size << (23 - kMantissaBits)) + ((127u - 60u) << 23);
  if (kSigned) bits |= static_cast<uint32_t>(code & 0x8000u) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

}  // namespace dalle_fast
