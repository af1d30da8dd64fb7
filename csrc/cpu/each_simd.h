// Compiles a header once per instruction set. Define DF_EACH_SIMD as the header's path and include this file in an
// anonymous namespace: it includes the header in the namespaces portable, avx2 and avx512, where DF_TARGET is the
// function attribute that selects the instruction set and DF_VECTOR_BYTES the size of its registers. DF_BEST(name) is
// the entity of that name for this processor.
//
// GCC lowers a vector by the attribute of the function that it is written in, so every function of such a header
// carries DF_TARGET. Neither file has an include guard.

namespace portable {
#define DF_TARGET
#define DF_VECTOR_BYTES 16
#include DF_EACH_SIMD
#undef DF_TARGET
#undef DF_VECTOR_BYTES
}  // namespace portable

#ifdef DF_X86
namespace avx2 {
#define DF_TARGET DF_AVX2
#define DF_VECTOR_BYTES 32
#include DF_EACH_SIMD
#undef DF_TARGET
#undef DF_VECTOR_BYTES
}  // namespace avx2

namespace avx512 {
#define DF_TARGET DF_AVX512
#define DF_VECTOR_BYTES 64
#include DF_EACH_SIMD
#undef DF_TARGET
#undef DF_VECTOR_BYTES
}  // namespace avx512
#endif

#undef DF_EACH_SIMD
