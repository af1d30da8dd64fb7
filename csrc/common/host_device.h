// The macros that let a header serve the C++ and the CUDA compiler.
#pragma once

#ifdef __CUDACC__
#define DF_HOST_DEVICE __host__ __device__
#else
#define DF_HOST_DEVICE
#endif

// For what loops call: a function that is not inlined is not compiled for the instruction set of its caller.
#define DF_ALWAYS_INLINE inline __attribute__((always_inline))
