// Small kernels that the emulation must run correctly or refuse: `check NAME` prints the result.
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda/intrinsics.h"
#include "cuda/mma.h"

using namespace dalle_fast;

namespace {

constexpr int kThreads = 96;

// A sum over the block in every way there is: shuffles in a warp, static and dynamic shared memory between them.
__global__ void block_sum(const int* in, int* out) {
  __shared__ int warps[kThreads / kWarp];
  DF_SHARED(bytes);
  int* total = reinterpret_cast<int*>(bytes);
  int sum = in[blockIdx.x * kThreads + threadIdx.x];
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == kThreads - 1) *total = warps[0] + warps[1] + warps[2];
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = *total;
}

__global__ void collectives(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane] = __shfl_sync(kAllLanes, lane, 5) + 100 * __shfl_up_sync(kAllLanes, lane, 1) +
              10000 * __shfl_down_sync(kAllLanes, lane, 4, 8);
  const unsigned ballot = __ballot_sync(kAllLanes, lane % 2);
  if (ballot != 0xAAAAAAAAu || !__any_sync(kAllLanes, lane == 3) || __all_sync(kAllLanes, lane != 3)) out[lane] = -1;
  const int2* all = warp_gather(make_int2(lane, -lane));
  if (all[31].x != 31 || all[7].y != -7) out[lane] = -2;
}

// Threads that have returned no longer count at barriers.
__global__ void early_return(int* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void stale_shared(float* out) {
  __shared__ float kept;
  DF_SHARED(bytes);
  if (threadIdx.x != 0) return;
  out[2 * blockIdx.x] = kept;
  out[2 * blockIdx.x + 1] = *reinterpret_cast<float*>(bytes);
  kept = *reinterpret_cast<float*>(bytes) = 1.0f;
}

__global__ void barrier_of_some(int) {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncwarp();
}

__global__ void shuffle_of_some(int) {
  if (threadIdx.x != 7) __shfl_sync(kAllLanes, 1, 0);
}

__global__ void different_collectives(int) {
  if (threadIdx.x < 7)
    __shfl_sync(kAllLanes, 1, 0);
  else
    __syncwarp();
}

__global__ void part_of_a_warp(int) { __syncwarp(0xFFFFu); }

__global__ void overrun(int* out) {
  DF_SHARED(bytes);
  out[0] = bytes[4 * (threadIdx.x + 1)];
}

// Each thread reads what another has written to shared memory, with only `meet` in between.
template <typename Meet>
DF_DEVICE void exchange(int* out, const Meet& meet) {
  __shared__ int values[kThreads];
  const unsigned thread = threadIdx.x;
  values[thread] = static_cast<int>(thread);
  meet();
  out[thread] = values[thread ^ 1];
}
__global__ void ordered_by_barrier(int* out) {
  exchange(out, [] { __syncthreads(); });
}
__global__ void ordered_by_warp(int* out) {
  exchange(out, [] { __syncwarp(); });
}
__global__ void unordered(int* out) {
  exchange(out, [] {});
}
__global__ void unordered_by_shuffle(int* out) {
  exchange(out, [] { __shfl_sync(kAllLanes, 0, 0); });
}

// A ring of one buffer, refilled while others may still read it, unless a barrier holds the copy back.
DF_DEVICE void refill(int* out, bool hold_back) {
  __shared__ int buffer[kThreads];
  const unsigned thread = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    copy_async<4>(&buffer[thread], &out[thread], true);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    const int neighbour = buffer[thread ^ 1];
    if (hold_back) __syncthreads();
    if (round == 1) out[thread] = neighbour;
  }
}
__global__ void late_copy(int* out) { refill(out, true); }
__global__ void early_copy(int* out) { refill(out, false); }

__global__ void flag_of_all(int* out) { raise_flag(out); }

template <typename Kernel, typename Out>
int check(Kernel kernel, dim3 grid, int threads, size_t shared_bytes, std::vector<Out> out) {
  const cudaError_t error = launch(kernel, grid, threads, shared_bytes, nullptr, out.data());
  if (error != cudaSuccess) return std::printf("%s\n", cudaGetErrorString(error)), 1;
  for (Out x : out) std::printf("%g ", static_cast<double>(x));
  return 0;
}

int refuse(void (*kernel)(int), int threads = 64, size_t shared_bytes = 0) {
  return std::printf("%s\n", cudaGetErrorString(launch(kernel, 2, threads, shared_bytes, nullptr, 0))), 0;
}

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  if (name == "block_sum") {
    std::vector<int> in(2 * kThreads), out(2);
    for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i);
    launch(block_sum, 2, kThreads, sizeof(int), nullptr, in.data(), out.data());
    return std::printf("%d %d", out[0], out[1]), 0;
  }
  if (name == "collectives") return check(collectives, 1, 32, 0, std::vector<int>(32));
  if (name == "early_return") return check(early_return, 1, 64, 0, std::vector<int>(64));
  if (name == "stale_shared") return check(stale_shared, 2, 32, 4, std::vector<float>(4));
  if (name == "overrun") return check(overrun, 1, 32, 128, std::vector<int>(1));
  if (name == "ordered_by_barrier") return check(ordered_by_barrier, 2, kThreads, 0, std::vector<int>(kThreads));
  if (name == "ordered_by_warp") return check(ordered_by_warp, 2, kThreads, 0, std::vector<int>(kThreads));
  if (name == "unordered") return check(unordered, 1, kThreads, 0, std::vector<int>(kThreads));
  if (name == "unordered_by_shuffle") return check(unordered_by_shuffle, 1, kThreads, 0, std::vector<int>(kThreads));
  if (name == "flag_of_all") return check(flag_of_all, 2, kThreads, 0, std::vector<int>(1));
  if (name == "late_copy") return check(late_copy, 2, kThreads, 0, std::vector<int>(kThreads));
  if (name == "early_copy") return check(early_copy, 1, kThreads, 0, std::vector<int>(kThreads));
  if (name == "barrier_of_some") return refuse(barrier_of_some);
  if (name == "shuffle_of_some") return refuse(shuffle_of_some);
  if (name == "different_collectives") return refuse(different_collectives);
  if (name == "part_of_a_warp") return refuse(part_of_a_warp);
  if (name == "odd_block") return refuse(part_of_a_warp, 40);
  if (name == "much_shared") return refuse(part_of_a_warp, 32, 228 * 1024);
  return 1;
}
