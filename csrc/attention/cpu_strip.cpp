// strip_kernels_impl.h, compiled for each instruction set, and the choice between them.
#include "attention/cpu_strip.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/simd.h"

namespace dalle_fast {
namespace {

namespace portable {
#define DF_TARGET
#define DF_VECTOR_BYTES 16
#include "attention/cpu_strip_impl.h"
#undef DF_TARGET
#undef DF_VECTOR_BYTES
}  // namespace portable

#ifdef DF_X86
namespace avx2 {
#define DF_TARGET DF_AVX2
#define DF_VECTOR_BYTES 32
#include "attention/cpu_strip_impl.h"
#undef DF_TARGET
#undef DF_VECTOR_BYTES
}  // namespace avx2

namespace avx512 {
#define DF_TARGET DF_AVX512
#define DF_VECTOR_BYTES 64
#include "attention/cpu_strip_impl.h"
#undef DF_TARGET
#undef DF_VECTOR_BYTES
}  // namespace avx512
#endif

}  // namespace

template <typename T>
StripKernels<T> strip_kernels(int64_t width) {
#ifdef DF_X86
  switch (simd_level()) {
    case Simd::kAvx512:
      return avx512::kernels<T>(width);
    case Simd::kAvx2:
      return avx2::kernels<T>(width);
    case Simd::kPortable:
      break;
  }
#endif
  return portable::kernels<T>(width);
}

template StripKernels<float> strip_kernels<float>(int64_t width);
template StripKernels<double> strip_kernels<double>(int64_t width);

}  // namespace dalle_fast
