// The one macro that lets a header serve the C++ and the CUDA compiler.
#pragma once

#ifdef __CUDACC__
#define DF_HOST_DEVICE __host__ __device__
#else
#define DF_HOST_DEVICE
#endif
