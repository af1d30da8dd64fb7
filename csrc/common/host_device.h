// The macros that let a header serve the C++ and the CUDA compiler.
#pragma once

#ifdef __CUDACC__
#define DF_HOST_DEVICE __host__ __device__
#else
#define DF_HOST_DEVICE
#endif

// For functions that vectorised loops call: only when inlined are they compiled for the instruction set of the caller.
#define DF_ALWAYS_INLINE inline __attribute__((always_inline))
