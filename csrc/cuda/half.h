// The 16-bit floating-point types as kernels see them: bits, and conversions that round to nearest even and keep NaN.
// On the device the conversions are instructions; the host does the same in plain C++, without any CUDA header.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/format.h"
#include "common/host_device.h"

namespace dalle_fast {

namespace half_detail {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline uint16_t encode_half(float x) {
  constexpr uint32_t kInfinity = 0x7F800000u, kOverflow = 0x477FF000u, kSmallestNormal = 0x38800000u;
  const uint32_t bits = bits_of(x), size = bits & 0x7FFFFFFFu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (size > kInfinity) return sign | 0x7E00u;
  if (size >= kOverflow) return sign | 0x7C00u;
  // Denormals: float32's adder rounds at the last place of 2^-24 when 0.5 is added.
  if (size < kSmallestNormal) return sign | static_cast<uint16_t>(bits_of(float_of(size) + 0.5f) - bits_of(0.5f));
  const uint32_t rounded = size + 0xFFFu + (size >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded >> 13) - ((127 - 15) << 10));
}

inline float decode_half(uint16_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x8000u) << 16, size = code & 0x7FFFu;
  if (size >= 0x7C00u) return float_of(sign | 0x7F800000u | size << 13);
  if (size < 0x0400u) return float_of(sign | bits_of(static_cast<float>(size) * 0x1p-24f));
  return float_of(sign | ((size << 13) + ((127u - 15u) << 23)));
}

inline uint16_t encode_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

}  // namespace half_detail

// The type a kernel computes in.
template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

DF_HOST_DEVICE inline float widen(float x) { return x; }
DF_HOST_DEVICE inline double widen(double x) { return x; }
DF_HOST_DEVICE inline float widen(Half x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return half_detail::decode_half(x.bits);
#endif
}
DF_HOST_DEVICE inline float widen(BFloat16 x) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
#else
  return half_detail::float_of(static_cast<uint32_t>(x.bits) << 16);
#endif
}

// narrow<T>(x): x in the format T.
template <typename T>
DF_HOST_DEVICE inline T narrow(Compute<T> x) {
  return x;
}
template <>
DF_HOST_DEVICE inline Half narrow<Half>(float x) {
  Half y;
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  y.bits = half_detail::encode_half(x);
#endif
  return y;
}
template <>
DF_HOST_DEVICE inline BFloat16 narrow<BFloat16>(float x) {
  BFloat16 y;
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  y.bits = half_detail::encode_bfloat16(x);
#endif
  return y;
}

// Calls f(T()) with the element type T of a format.
template <typename F>
auto with_element_type(Format format, const F& f) {
  switch (format) {
    case Format::kFloat64:
      return f(double());
    case Format::kBFloat16:
      return f(BFloat16());
    case Format::kFloat16:
      return f(Half());
    default:
      return f(float());
  }
}

}  // namespace dalle_fast
