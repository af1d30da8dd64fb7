// Formats of tensor elements: as a value, for kernels that choose at run time, and as types with their conversions, for
// host and device. 16-bit numbers are rounded to nearest even and NaN stays NaN: with instructions on the device, on
// the host without a branch, so that loops vectorise (not every processor with AVX2 converts float16). Not by
// cuda_fp16.h: the emulation runs without a CUDA toolkit.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/host_device.h"

namespace dalle_fast {

enum class Format { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct alignas(2) Half {
  uint16_t bits;
};

struct alignas(2) BFloat16 {
  uint16_t bits;
};

// The type to compute in with elements of type S: float, or double for double.
template <typename S>
using Arithmetic = std::conditional_t<std::is_same_v<S, double>, double, float>;

DF_HOST_DEVICE DF_ALWAYS_INLINE float float_from_bits(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

DF_HOST_DEVICE DF_ALWAYS_INLINE int32_t bits_from_float(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// widen(x): an element as a number.
DF_HOST_DEVICE DF_ALWAYS_INLINE float widen(float x) { return x; }
DF_HOST_DEVICE DF_ALWAYS_INLINE double widen(double x) { return x; }
DF_HOST_DEVICE DF_ALWAYS_INLINE float widen(BFloat16 x) {
  return float_from_bits(static_cast<int32_t>(static_cast<uint32_t>(x.bits) << 16));
}
DF_HOST_DEVICE DF_ALWAYS_INLINE float widen(Half x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const int32_t bits = static_cast<int32_t>(static_cast<uint32_t>(x.bits) << 16), size = (bits & INT32_MAX) >> 3;
  // The exponent is 112 more in float32. 224 more keep infinity and NaN; the factor takes the rest back.
  const float normal = float_from_bits(size + (224 << 23)) * 0x1p-112f;
  const float magnitude = size < 0x0400 << 13 ? static_cast<float>(size) * 0x1p-37f : normal;
  return float_from_bits(bits_from_float(magnitude) | (bits & INT32_MIN));
#endif
}

// narrow<S>(x): a number as an element.
template <typename S>
DF_HOST_DEVICE DF_ALWAYS_INLINE S narrow(Arithmetic<S> x) {
  return x;
}
template <>
DF_HOST_DEVICE DF_ALWAYS_INLINE BFloat16 narrow<BFloat16>(float x) {
#ifdef __CUDA_ARCH__
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t bits = static_cast<uint32_t>(bits_from_float(x));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded)};
#endif
}
template <>
DF_HOST_DEVICE DF_ALWAYS_INLINE Half narrow<Half>(float x) {
#ifdef __CUDA_ARCH__
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  constexpr int32_t kSmallest = 113 << 23, kOverflow = 143 << 23, kExponent = 255 << 23;  // 2^-14, 2^16, infinity
  const int32_t bits = bits_from_float(x), all = bits & INT32_MAX;
  const int32_t size = all < kOverflow ? all : kOverflow;
  const int32_t exponent = (size & kExponent) > kSmallest ? size & kExponent : kSmallest;
  // The last place of 2^13 times the power of two is float16's: the adder rounds there.
  const int32_t unit = exponent + (13 << 23);
  const int32_t places = bits_from_float(float_from_bits(size) + float_from_bits(unit)) - unit;
  const int32_t half = all > kExponent ? 0x7E00 : ((exponent - kSmallest) >> 13) + places;
  return {static_cast<uint16_t>(half | (bits >> 16 & 0x8000))};
#endif
}

// Calls f(S()) for the element type S of a format: the one place where a format becomes a type.
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // f is for the side that calls
#endif
template <typename F>
DF_HOST_DEVICE DF_ALWAYS_INLINE auto with_format(Format format, const F& f) {
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
