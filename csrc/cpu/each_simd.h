// Compiles a header once for each instruction set: with DF_EACH_SIMD defined as its path, inside an anonymous
// namespace, this file includes it in the namespaces portable, avx2 and avx512. There DF_TARGET is the function
// attribute that selects the instruction set, and DF_VECTOR_BYTES the size of its registers. GCC lowers a vector by the
// attribute of the function that it is written in, so every function of such a header carries DF_TARGET. DF_BEST(name)
// is the name for this processor. Hence no include guard, here nor there.

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
