// Plain loops, compiled twice: for AVX2 + FMA and for any processor; the loader picks. No -march flag is needed.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define DF_SIMD_CLONES __attribute__((target_clones("arch=haswell", "default")))
#else
#define DF_SIMD_CLONES
#endif

// A template cannot be cloned: it is inlined into cloned functions instead.
#define DF_ALWAYS_INLINE inline __attribute__((always_inline))
