// Products of small matrices of 16-bit elements (T: Half, BFloat16) on the tensor cores, and the copies that feed them:
// a PTX instruction each. The emulation has its own header of this name.
//
//   pack<T>(low, high), unpack<T>(bits)   two elements as one word
//   mma<T>(c, a, b0, b1)                  c += a b
//   load_blocks(blocks, row)              four blocks [8, 8] from shared memory: lane 8 i + j gives the address of
//                                         row j of block i, aligned to 16 bytes; of each, gets (g, 2t) and (g, 2t + 1)
//   load_blocks_transposed(blocks, row)   the same, but (2t, g) and (2t + 1, g)
//   copy_async<bytes>(shared, x, inside)  starts a copy of 4 or 16 bytes, aligned to these; of zeros if not `inside`
//   commit_copies()                       the thread's copies since the last call become a group
//   wait_copies<n>()                      waits until all but the thread's last n groups have arrived
//
// All lanes of a warp call mma and load_blocks together. A lane is 4 g + t and holds, as pairs of neighbouring columns
// or (for b) rows, the lower index in the lower half:
//   a [16, 16]: a[0] (g, 2t), a[1] (g + 8, 2t), a[2] (g, 2t + 8), a[3] (g + 8, 2t + 8)
//   b [16, 8]:  b0 (2t, g), b1 (2t + 8, g)
//   c [16, 8]:  c[0], c[1] (g, 2t), c[2], c[3] (g + 8, 2t), in float32
// So the pairs of two neighbouring c make an a: a product can be the left side of the next one in place.
#pragma once

#include <type_traits>

#include "common/format.h"
#include "cuda/device.h"

namespace dalle_fast {

DF_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

template <typename T>
DF_DEVICE uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}

template <typename T>
DF_DEVICE float2 unpack(uint32_t bits) {
  if constexpr (std::is_same_v<T, Half>) {
    float2 pair;
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(pair.x), "=f"(pair.y)
        : "r"(bits));
    return pair;
  } else {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000u));
  }
}

template <typename T>
DF_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, Half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

DF_DEVICE void load_blocks(uint32_t (&blocks)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(blocks[0]), "=r"(blocks[1]), "=r"(blocks[2]), "=r"(blocks[3])
               : "r"(shared_address(row))
               : "memory");
}

DF_DEVICE void load_blocks_transposed(uint32_t (&blocks)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(blocks[0]), "=r"(blocks[1]), "=r"(blocks[2]), "=r"(blocks[3])
               : "r"(shared_address(row))
               : "memory");
}

template <int kBytes>
DF_DEVICE void copy_async(void* shared, const void* global, bool inside) {
  static_assert(kBytes == 4 || kBytes == 16);
  const int bytes = inside ? kBytes : 0;
  if constexpr (kBytes == 16) {  // past the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}

DF_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
DF_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace dalle_fast
