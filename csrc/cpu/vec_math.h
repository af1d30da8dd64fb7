// exp and log that the compiler can vectorise: branch-free, no calls. float is within 2 ulp, double is the libm's.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/format.h"
#include "common/host_device.h"

namespace dalle_fast {

// For x up to 88; 0 below -87, where the result would soon be denormal; NaN for NaN.
DF_ALWAYS_INLINE float vec_exp(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // x - n ln 2, |r| <= ln 2 / 2
  // Minimax fit of (exp(r) - 1 - r) / r^2.
  float p = 0.00831247771f;
  p = p * r + 0.0418905504f;
  p = p * r + 0.1666711631f;
  p = p * r + 0.4999922882f;
  p = (p * r + 1.0f) * r + 1.0f;
  const int32_t power = static_cast<int32_t>(static_cast<uint32_t>(bits_from_float(shifted)) << 23);  // n << 23
  const float result = float_from_bits(bits_from_float(p) + power);
  return x < -87.0f ? 0.0f : result;
}

// For positive, normal x.
DF_ALWAYS_INLINE float vec_log(float x) {
  const int32_t bits = bits_from_float(x);
  const int32_t offset = bits - 0x3F3504F3;  // sqrt(1/2): the mantissa m lies in [sqrt(1/2), sqrt(2))
  const int32_t exponent = offset >> 23;
  const float f = float_from_bits(bits - static_cast<int32_t>(static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  // Minimax fit of (log(1 + f) - f) / f^2, summed in pairs, since the chain of dependent products takes the time.
  const float f2 = f * f, f4 = f2 * f2;
  const float p0 = (-0.4999999161f + 0.3333395022f * f) + (-0.2500175527f + 0.1996207206f * f) * f2;
  const float p4 = (-0.1657050770f + 0.1491797399f * f) + (-0.1430752557f + 0.0873484679f * f) * f2;
  const float p = p0 + p4 * f4;
  return static_cast<float>(exponent) * 0.693147181f + (p * f2 + f);
}

DF_ALWAYS_INLINE double vec_exp(double x) { return std::exp(x); }
DF_ALWAYS_INLINE double vec_log(double x) { return std::log(x); }

}  // namespace dalle_fast
