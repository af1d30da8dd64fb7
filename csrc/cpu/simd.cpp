// The instruction set of this process: what the processor has, lowered by DALLE_FAST_SIMD.
#include "cpu/simd.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace dalle_fast {
namespace {

Simd best_of_processor() {
#ifdef DF_X86
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi") ||
      !__builtin_cpu_supports("bmi2")) {
    return Simd::kPortable;
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Simd::kAvx512;
  }
  return Simd::kAvx2;
#else
  return Simd::kPortable;
#endif
}

Simd choose() {
  const Simd best = best_of_processor();
  const char* wish = std::getenv("DALLE_FAST_SIMD");
  if (wish == nullptr || *wish == '\0') return best;
  for (const Simd level : {Simd::kPortable, Simd::kAvx2, Simd::kAvx512}) {
    if (std::string(wish) == simd_name(level)) return level < best ? level : best;
  }
  throw std::invalid_argument(std::string("DALLE_FAST_SIMD: expected portable, avx2 or avx512, got ") + wish);
}

}  // namespace

const char* simd_name(Simd level) {
  switch (level) {
    case Simd::kAvx512:
      return "avx512";
    case Simd::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

Simd simd_level() {
  static const Simd level = choose();
  return level;
}

}  // namespace dalle_fast
