// One source, three instruction sets: any processor, AVX2 + FMA, AVX-512. The choice is made at run time; no -march
// flag is needed. DALLE_FAST_SIMD=portable or avx2 in the environment lowers it, so that the tests reach every path.
#pragma once

#include "common/host_device.h"

namespace dalle_fast {

enum class Simd { kPortable, kAvx2, kAvx512 };

// The best instruction set that the processor has and the environment allows; throws for an unknown name.
Simd simd_level();
const char* simd_name(Simd level);

#if defined(__x86_64__) && defined(__GNUC__)
#define DF_X86
#define DF_AVX2 __attribute__((target("avx2,fma,bmi,bmi2")))
#if defined(__clang__)
#define DF_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2")))
#else
#define DF_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,prefer-vector-width=512")))
#endif

// By value, so that captures live in registers and the compiler sees that stores cannot change them.
template <typename Body>
DF_AVX2 auto run_avx2(Body body) {
  return body();
}
template <typename Body>
DF_AVX512 auto run_avx512(Body body) {
  return body();
}
#endif

// Of the three entities of one name that cpu/each_simd.h makes, the one for this processor.
#ifdef DF_X86
#define DF_BEST(name) \
  (simd_level() == Simd::kAvx512 ? avx512::name : simd_level() == Simd::kAvx2 ? avx2::name : portable::name)
#else
#define DF_BEST(name) (portable::name)
#endif

// Calls a lambda of plain loops, compiled for each instruction set: simd([=]() DF_INLINE_LAMBDA { ... }). Whatever it
// calls must be DF_ALWAYS_INLINE, or stays portable.
#define DF_INLINE_LAMBDA __attribute__((always_inline))

template <typename Body>
auto simd(Body body) {
#ifdef DF_X86
  switch (simd_level()) {
    case Simd::kAvx512:
      return run_avx512(body);
    case Simd::kAvx2:
      return run_avx2(body);
    case Simd::kPortable:
      break;
  }
#endif
  return body();
}

}  // namespace dalle_fast
