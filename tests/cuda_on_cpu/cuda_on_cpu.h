// The CUDA language on a CPU, as far as the kernels of csrc use it: for tests without a GPU, and for nothing else. The
// headers of csrc that must differ are in common/ and cuda/ beside this one, which come first on the include path.
//
// Blocks run one after another. The threads of a block are fibers: one runs until it waits at a barrier or a warp
// collective, then the next. Shared memory holds NaN (all bits set) at the start of every block. Mistakes that hardware
// punishes only now and then are errors here: a barrier or a collective that not all threads reach, a collective on
// part of a warp, more shared memory than a block can have.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

using std::isfinite;  // which CUDA has without a namespace

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// One block at a time: static memory is enough. Its own section, so that it can be overwritten between blocks.
#define __shared__ static __attribute__((section("cuda_on_cpu_shared")))

// Vector types.
#define CUDA_ON_CPU_VECTORS(T, name, align2, align4)                 \
  struct alignas(align2) name##2 { T x, y; };                        \
  struct name##3 { T x, y, z; };                                     \
  struct alignas(align4) name##4 { T x, y, z, w; };                  \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTORS(float, float, 8, 16)
CUDA_ON_CPU_VECTORS(int, int, 8, 16)
CUDA_ON_CPU_VECTORS(unsigned, uint, 8, 16)
CUDA_ON_CPU_VECTORS(unsigned short, ushort, 4, 8)
CUDA_ON_CPU_VECTORS(double, double, 16, 16)
#undef CUDA_ON_CPU_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

// The runtime.
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
using cudaStream_t = struct CUstream_st*;

const char* cudaGetErrorString(cudaError_t error);  // of a failed launch: the reason, and the thread
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  return *attributes = {}, cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int threads, size_t shared_bytes) {
  return *blocks = 1, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  return std::memset(data, value, bytes), cudaSuccess;
}

namespace cuda_on_cpu {

constexpr size_t kMaxSharedBytes = 227 * 1024;  // of a block, on sm_90
constexpr size_t kMaxGathered = 256;            // bytes a thread hands to warp_gather

cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);
[[noreturn]] void fail(const char* what);  // ends the launch with an error that names the calling thread
unsigned char* dynamic_shared();
int lane();

// Waits for the other threads of the warp; returns the `bytes` bytes of each, one after another. `orders_memory`, as
// __syncwarp does and shuffles do not, matters to ThreadSanitizer alone.
const void* gather(const void* mine, size_t bytes, bool orders_memory);

// For ThreadSanitizer: the calling thread may write these bytes at any time from now on.
void may_write(void* data, size_t bytes);

}  // namespace cuda_on_cpu

// Launches.
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  return cuda_on_cpu::run(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                          [&] { std::apply(kernel, values); });
}

// Returns the values of all 32 lanes, each of which must call it; valid until the caller's next warp_gather. All
// collectives of a warp are made of it.
template <typename T>
const T* warp_gather(const T& mine) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= cuda_on_cpu::kMaxGathered);
  return static_cast<const T*>(cuda_on_cpu::gather(&mine, sizeof(T), false));
}

void __syncthreads();

inline void cuda_on_cpu_check(unsigned mask) {
  if (mask != 0xFFFFFFFFu) cuda_on_cpu::fail("a warp collective needs all 32 lanes");
}
template <typename T>
const T* cuda_on_cpu_masked_gather(unsigned mask, const T& mine) {
  cuda_on_cpu_check(mask);
  return warp_gather(mine);
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  cuda_on_cpu_check(mask);
  cuda_on_cpu::gather("", 1, true);
}
inline unsigned __activemask() { return 0xFFFFFFFFu; }

// A shuffle within groups of `width` lanes: a source outside the group is the lane itself.
template <typename T>
T __shfl_sync(unsigned mask, T x, int source, int width = warpSize) {
  const int first = cuda_on_cpu::lane() / width * width;
  return cuda_on_cpu_masked_gather(mask, x)[first + source % width];
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int width = warpSize) {
  const int lane = cuda_on_cpu::lane(), source = lane ^ bits;
  return cuda_on_cpu_masked_gather(mask, x)[source / width <= lane / width ? source : lane];
}
template <typename T>
T __shfl_up_sync(unsigned mask, T x, unsigned distance, int width = warpSize) {
  const int lane = cuda_on_cpu::lane(), by = static_cast<int>(distance);
  return cuda_on_cpu_masked_gather(mask, x)[lane % width >= by ? lane - by : lane];
}
template <typename T>
T __shfl_down_sync(unsigned mask, T x, unsigned distance, int width = warpSize) {
  const int lane = cuda_on_cpu::lane(), by = static_cast<int>(distance);
  return cuda_on_cpu_masked_gather(mask, x)[lane % width + by < width ? lane + by : lane];
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const bool* votes = cuda_on_cpu_masked_gather(mask, predicate != 0);
  unsigned ballot = 0;
  for (int lane = 0; lane < warpSize; ++lane) ballot |= static_cast<unsigned>(votes[lane]) << lane;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xFFFFFFFFu; }

// Fences order nothing here: threads take turns only at barriers and collectives.
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { cuda_on_cpu::fail("trap"); }

// Memory accesses with a hint for the caches.
template <typename T>
T __ldg(const T* x) {
  return *x;
}
template <typename T>
T __ldcs(const T* x) {
  return *x;
}
template <typename T>
T __ldcg(const T* x) {
  return *x;
}
template <typename T>
void __stcs(T* x, T value) {
  *x = value;
}
template <typename T>
void __stcg(T* x, T value) {
  *x = value;
}

// Arithmetic.
template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>((uint64_t{x} * y) >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

template <typename To, typename From>
To cuda_on_cpu_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline unsigned __float_as_uint(float x) { return cuda_on_cpu_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu_bits<float>(x); }
inline int __float_as_int(float x) { return cuda_on_cpu_bits<int>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu_bits<float>(x); }
