// Plain loops, compiled twice: for AVX2 + FMA and for any processor; the loader picks. No -march flag is needed.
#pragma once

// "arch=haswell" would ask for that very processor; "x86-64-v3" asks for what it can do. GCC below 12 does not know it.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define DF_SIMD_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define DF_SIMD_CLONES __attribute__((target_clones("avx2", "default")))
#endif
#else
#define DF_SIMD_CLONES
#endif

// A template cannot be cloned: it is inlined into cloned functions instead.
#define DF_ALWAYS_INLINE inline __attribute__((always_inline))
