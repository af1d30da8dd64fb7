// Compiles attention/cpu_strip_impl.h for each instruction set and chooses between them.
#include "attention/cpu_strip.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/simd.h"

namespace dalle_fast::attention {
namespace {

#define DF_EACH_SIMD "attention/cpu_strip_impl.h"
#include "cpu/each_simd.h"

}  // namespace

template <typename T>
StripKernels<T> strip_kernels(int64_t width) {
  return DF_BEST(kernels<T>)(width);
}

template StripKernels<float> strip_kernels<float>(int64_t width);
template StripKernels<double> strip_kernels<double>(int64_t width);

}  // namespace dalle_fast::attention
