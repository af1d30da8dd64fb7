// The scheduler: the threads of a block as fibers that hand over to each other at barriers and warp collectives.
#include "cuda_on_cpu.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>

#include "sanitizers.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

// The linker's names for the bounds of all __shared__ variables; weak, because there may be none.
extern "C" {
extern unsigned char __start_cuda_on_cpu_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_cuda_on_cpu_shared[] __attribute__((weak, visibility("hidden")));
}

// Saves the registers that a call must preserve on the running stack, stores the end of that in *from, and continues
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
  void* top = nullptr;  // of the stack, while the fiber does not run; null if it was left in the middle of a kernel
  SanitizedFiber sanitized;
};

struct Warp {
  alignas(16) unsigned char values[2][warpSize * kMaxGathered];
  unsigned turn;  // the next collective fills values[turn % 2]; the other half may still be read
  int waiting;
  size_t bytes;
  Meeting memory;
};

struct Free {
  void operator()(void* data) const { std::free(data); }
};

std::mutex launches;  // one at a time
Fiber fibers[kMaxThreads];
Warp warps[kMaxThreads / warpSize];
Fiber host;
Fiber *running = &host, *left = &host;  // `left` is the one that ran before
int threads, returned, at_barrier;
unsigned barrier;  // the next one's number
Meeting barrier_memory, block_memory;
const std::function<void()>* thread_body;
std::unique_ptr<unsigned char, Free> shared;
std::string message;

int running_index() { return static_cast<int>(running - fibers); }

void switch_to(Fiber* next) {
  left = running;
  running = next;
  if (next != &host) {
    const unsigned i = static_cast<unsigned>(running_index());
    threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  }
  void** const from = &left->top;
  void* const to = next->top;
  left->sanitized.leave_for(next->sanitized);
  cuda_on_cpu_switch(from, to);
  running->sanitized.arrive_from(left->sanitized);
}

std::string name(const dim3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

// Switches to a thread that can run, or to the host when all have returned.
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
  ++barrier;
}

void run_fiber() {
  running->sanitized.arrive_from(left->sanitized);
  for (;;) {  // once per block
    block_memory.leave(0);
    (*thread_body)();
    block_memory.arrive(1);
    const Scheduling scheduling;
    running->state = State::kDone;
    ++returned;
    release_barrier_if_all_are_there();
    hand_over();
  }
}

void prepare(Fiber& fiber) {
  fiber.state = State::kReady;
  if (fiber.top != nullptr) return;
  SanitizedFiber& sanitized = fiber.sanitized;
  if (sanitized.stack == nullptr) {
    sanitized.stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (sanitized.stack == MAP_FAILED) std::abort();
    sanitized.stack_bytes = kStackBytes;
  }
  sanitized.start();
  // As if run_fiber had been called, with a return address above it, and left before its first instruction.
  void** end = reinterpret_cast<void**>(static_cast<char*>(const_cast<void*>(sanitized.stack)) + kStackBytes);
  constexpr int kRegisters = 6;
  end[-1] = nullptr;
  end[-2] = reinterpret_cast<void*>(run_fiber);
  fiber.top = std::fill_n(end - 2 - kRegisters, kRegisters, nullptr) - kRegisters;
}

// AddressSanitizer guards the bytes between the variables.
__attribute__((no_sanitize("address"))) void poison_static_shared() {
  for (volatile unsigned char* byte = __start_cuda_on_cpu_shared; byte < __stop_cuda_on_cpu_shared; ++byte) {
    *byte = kPoison;
  }
}

void run_block(size_t shared_bytes) {
  poison_static_shared();
  std::memset(shared.get(), kPoison, shared_bytes);
  returned = at_barrier = 0;
  for (Warp& warp : warps) warp.waiting = 0;
  for (int i = 0; i < threads; ++i) prepare(fibers[i]);
  block_memory.arrive(0);
  switch_to(&fibers[0]);
  block_memory.leave(1);
  if (message.empty()) return;
  for (int i = 0; i < threads; ++i) fibers[i].top = nullptr;
}

}  // namespace

void fail(const char* what) {
  const Scheduling scheduling;
  message = std::string(what) + ", in thread " + name(threadIdx) + " of block " + name(blockIdx);
  switch_to(&host);
  std::abort();
}

unsigned char* dynamic_shared() { return shared.get(); }

void may_write(void* data, size_t bytes) {
#ifdef __SANITIZE_THREAD__
  __tsan_write_range(data, bytes);
#endif
}

int lane() { return running_index() % warpSize; }

const void* gather(const void* mine, size_t bytes, bool orders_memory) {
  const Scheduling scheduling;
  const int first = running_index() / warpSize * warpSize;
  Warp& warp = warps[first / warpSize];
  if (warp.waiting > 0 && warp.bytes != bytes) fail("lanes of a warp meet in different collectives");
  const unsigned turn = warp.turn;
  unsigned char* const values = warp.values[turn % 2];
  std::memcpy(values + lane() * bytes, mine, bytes);
  warp.bytes = bytes;
  if (orders_memory) warp.memory.arrive(turn);
  if (++warp.waiting < warpSize) {
    running->state = State::kInCollective;
    hand_over();
  } else {
    for (int i = first; i < first + warpSize; ++i) fibers[i].state = State::kReady;
    ++warp.turn;
    warp.waiting = 0;
  }
  if (orders_memory) warp.memory.leave(turn);
  return values;
}

cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(launches);
  const Scheduling scheduling;
  host.sanitized.adopt();
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
  const Scheduling scheduling;
  const unsigned number = barrier;
  barrier_memory.arrive(number);
  ++at_barrier;
  running->state = State::kAtBarrier;
  release_barrier_if_all_are_there();
  if (running->state != State::kReady) hand_over();
  barrier_memory.leave(number);
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : cuda_on_cpu::message.c_str();
}

// Two multiprocessors, so that kernels with a fixed number of blocks go round more than once.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : static_cast<int>(cuda_on_cpu::kMaxSharedBytes);
  return cudaSuccess;
}
