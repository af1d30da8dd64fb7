// The scheduler: the threads of a block as fibers that hand over to each other at barriers and warp collectives.
#include "cuda_on_cpu.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

// The linker's names for the bounds of all __shared__ variables; weak, because there may be none.
extern "C" {
extern unsigned char __start_cuda_on_cpu_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_cuda_on_cpu_shared[] __attribute__((weak, visibility("hidden")));
}

// Keeps the registers that a call must preserve on the running stack, stores where that ends in *from, and goes on
// where `to` was left. swapcontext would do, but it calls the system each time.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
#ifndef __x86_64__
#error "the emulation of CUDA switches stacks on x86-64 only"
#endif
asm(R"(
.pushsection .text
.hidden cuda_on_cpu_switch
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size cuda_on_cpu_switch, . - cuda_on_cpu_switch
.popsection
)");

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned char kPoison = 0xFF;  // NaN in every floating-point format

enum class State { kReady, kAtBarrier, kInCollective, kDone };

struct Fiber {
  State state = State::kReady;
  void* top = nullptr;  // of the stack, while the fiber does not run
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* sanitizer = nullptr;  // what AddressSanitizer keeps of a fiber that does not run
};

struct Warp {
  alignas(16) unsigned char values[2][warpSize * kMaxGathered];
  int half;  // which of the two the next collective fills; the other may still be read
  int waiting;
  size_t bytes;
};

struct Free {
  void operator()(void* data) const { std::free(data); }
};

std::mutex launches;  // one at a time
std::vector<Fiber> fibers(kMaxThreads);
std::vector<Warp> warps(kMaxThreads / warpSize);
Fiber host;
Fiber *running = &host, *left = &host;  // `left` is the one that ran before
int threads, returned, at_barrier;
const std::function<void()>* thread_body;
std::unique_ptr<unsigned char, Free> shared;
std::string message;

int running_index() { return static_cast<int>(running - fibers.data()); }

void arrive() {
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(running->sanitizer, &stack, &bytes);
  if (left == &host) host.stack = stack, host.stack_bytes = bytes;
#endif
}

void switch_to(Fiber* next) {
  left = running;
  running = next;
  if (next != &host) {
    const unsigned i = static_cast<unsigned>(running_index());
    threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  }
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(left->state == State::kDone ? nullptr : &left->sanitizer, next->stack,
                                 next->stack_bytes);
#endif
  cuda_on_cpu_switch(&left->top, next->top);
  arrive();
}

std::string name(const dim3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

// Runs any thread that can; the launch is over when all have returned.
void hand_over() {
  int waiting = 0;
  for (int i = running_index() + 1, n = 0; n < threads; ++i, ++n) {
    if (i >= threads) i -= threads;
    if (fibers[i].state == State::kReady) return switch_to(&fibers[i]);
    waiting += fibers[i].state == State::kInCollective;
  }
  if (returned < threads) {
    message = "deadlock in block " + name(blockIdx) + ": of " + std::to_string(threads) + " threads " +
              std::to_string(at_barrier) + " wait at __syncthreads, " + std::to_string(waiting) +
              " in a warp collective, " + std::to_string(returned) + " have returned";
  }
  switch_to(&host);
}

void release_barrier_if_all_are_there() {
  if (at_barrier + returned < threads) return;
  for (int i = 0; i < threads; ++i) {
    if (fibers[i].state == State::kAtBarrier) fibers[i].state = State::kReady;
  }
  at_barrier = 0;
}

void run_fiber() {
  arrive();
  (*thread_body)();
  running->state = State::kDone;
  ++returned;
  release_barrier_if_all_are_there();
  hand_over();
}

void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    fiber.stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fiber.stack == MAP_FAILED) std::abort();
    fiber.stack_bytes = kStackBytes;
  }
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack, fiber.stack_bytes);
#endif
  fiber.sanitizer = nullptr;
  fiber.state = State::kReady;
  // As if run_fiber had been called, with a return address above it, and left before its first instruction.
  void** end = reinterpret_cast<void**>(static_cast<char*>(const_cast<void*>(fiber.stack)) + fiber.stack_bytes);
  constexpr int kRegisters = 6;
  end[-1] = nullptr;
  end[-2] = reinterpret_cast<void*>(run_fiber);
  fiber.top = std::fill_n(end - 2 - kRegisters, kRegisters, nullptr) - kRegisters;
}

// Between the variables lies what AddressSanitizer guards.
__attribute__((no_sanitize("address"))) void poison_static_shared() {
  for (volatile unsigned char* byte = __start_cuda_on_cpu_shared; byte < __stop_cuda_on_cpu_shared; ++byte) {
    *byte = kPoison;
  }
}

void run_block(size_t shared_bytes) {
  poison_static_shared();
  std::memset(shared.get(), kPoison, shared_bytes);
  returned = at_barrier = 0;
  for (Warp& warp : warps) warp.half = warp.waiting = 0;
  for (int i = 0; i < threads; ++i) prepare(fibers[i]);
  switch_to(&fibers[0]);
}

}  // namespace

void fail(const char* what) {
  message = std::string(what) + ", in thread " + name(threadIdx) + " of block " + name(blockIdx);
  running->state = State::kDone;
  switch_to(&host);
  std::abort();
}

unsigned char* dynamic_shared() { return shared.get(); }

int lane() { return running_index() % warpSize; }

const void* gather(const void* mine, size_t bytes) {
  const int first = running_index() / warpSize * warpSize;
  Warp& warp = warps[first / warpSize];
  if (warp.waiting > 0 && warp.bytes != bytes) fail("lanes of a warp meet in different collectives");
  unsigned char* const values = warp.values[warp.half];
  std::memcpy(values + lane() * bytes, mine, bytes);
  warp.bytes = bytes;
  if (++warp.waiting < warpSize) {
    running->state = State::kInCollective;
    hand_over();
  } else {
    for (int i = first; i < first + warpSize; ++i) fibers[i].state = State::kReady;
    warp.half ^= 1;
    warp.waiting = 0;
  }
  return values;
}

cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(launches);
  const uint64_t size = uint64_t{block.x} * block.y * block.z;
  if (grid.x < 1 || grid.x > INT32_MAX || grid.y < 1 || grid.y > 65535 || grid.z < 1 || grid.z > 65535 || size < 1 ||
      size > kMaxThreads || size % warpSize != 0) {
    message = "grid " + name(grid) + " of blocks " + name(block) + ": expected whole warps, at most 1024 threads";
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > kMaxSharedBytes) {
    message = "a block cannot have " + std::to_string(shared_bytes) + " bytes of shared memory";
    return cudaErrorInvalidValue;
  }
  void* memory;
  if (posix_memalign(&memory, 1024, shared_bytes) != 0) std::abort();
  shared.reset(static_cast<unsigned char*>(memory));
  message.clear();
  thread_body = &thread;
  threads = static_cast<int>(size);
  gridDim = grid;
  blockDim = block;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block(shared_bytes);
        if (!message.empty()) return cudaErrorLaunchFailure;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

void __syncthreads() {
  using namespace cuda_on_cpu;
  ++at_barrier;
  running->state = State::kAtBarrier;
  release_barrier_if_all_are_there();
  if (running->state != State::kReady) hand_over();
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : cuda_on_cpu::message.c_str();
}

// Two multiprocessors, so that kernels with a fixed number of blocks go round more than once.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : static_cast<int>(cuda_on_cpu::kMaxSharedBytes);
  return cudaSuccess;
}
