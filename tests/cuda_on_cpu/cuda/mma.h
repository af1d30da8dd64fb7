// Replaces csrc/cuda/mma.h, which describes the functions: here element by element, from the values of all lanes.
#pragma once

#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#include "common/format.h"
#include "cuda/device.h"

namespace dalle_fast {

template <typename T>
uint32_t pack(float low, float high) {
  const T pair[2] = {narrow<T>(low), narrow<T>(high)};
  uint32_t bits;
  std::memcpy(&bits, pair, sizeof(bits));
  return bits;
}

template <typename T>
float2 unpack(uint32_t bits) {
  T pair[2];
  std::memcpy(pair, &bits, sizeof(bits));
  return {widen(pair[0]), widen(pair[1])};
}

template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands* lanes = warp_gather(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int g = cuda_on_cpu::lane() / 4, t = cuda_on_cpu::lane() % 4;
  for (int k = 0; k < 16; k += 2) {
    const int lane = k % 8 / 2, half = k / 8;
    const float2 top = unpack<T>(lanes[4 * g + lane].a[2 * half]);
    const float2 bottom = unpack<T>(lanes[4 * g + lane].a[2 * half + 1]);
    for (int n = 0; n < 2; ++n) {
      const float2 column = unpack<T>(lanes[4 * (2 * t + n) + lane].b[half]);
      c[n] += top.x * column.x + top.y * column.y;
      c[2 + n] += bottom.x * column.x + bottom.y * column.y;
    }
  }
}

inline void load_blocks(uint32_t (&blocks)[4], const void* row) {
  const void* const* rows = warp_gather(row);
  const int g = cuda_on_cpu::lane() / 4, t = cuda_on_cpu::lane() % 4;
  for (int i = 0; i < 4; ++i) std::memcpy(&blocks[i], static_cast<const uint32_t*>(rows[8 * i + g]) + t, 4);
}

inline void load_blocks_transposed(uint32_t (&blocks)[4], const void* row) {
  const void* const* rows = warp_gather(row);
  const int g = cuda_on_cpu::lane() / 4, t = cuda_on_cpu::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) pair[j] = static_cast<const uint16_t*>(rows[8 * i + 2 * t + j])[g];
    std::memcpy(&blocks[i], pair, 4);
  }
}

// Copies that the calling thread has started. They take place when it waits for them, no earlier.
struct Copies {
  struct Copy {
    void* shared;
    const void* global;  // null: zeros
    size_t bytes;
  };
  std::vector<Copy> started;
  std::deque<std::vector<Copy>> groups;

  static Copies& of_thread() {
    static std::vector<Copies> copies(1024);
    return copies[threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)];
  }
};

template <int kBytes>
void copy_async(void* shared, const void* global, bool inside) {
  if (reinterpret_cast<uintptr_t>(shared) % kBytes != 0 || reinterpret_cast<uintptr_t>(global) % kBytes != 0) {
    cuda_on_cpu::fail("a copy that is not aligned");
  }
  cuda_on_cpu::may_write(shared, kBytes);
  Copies::of_thread().started.push_back({shared, inside ? global : nullptr, kBytes});
}

inline void commit_copies() {
  Copies& copies = Copies::of_thread();
  copies.groups.push_back(std::move(copies.started));
  copies.started.clear();
}

template <int kGroups>
void wait_copies() {
  auto& groups = Copies::of_thread().groups;
  for (; groups.size() > kGroups; groups.pop_front()) {
    for (const Copies::Copy& copy : groups.front()) {
      if (copy.global != nullptr) {
        std::memcpy(copy.shared, copy.global, copy.bytes);
      } else {
        std::memset(copy.shared, 0, copy.bytes);
      }
    }
  }
}

}  // namespace dalle_fast
