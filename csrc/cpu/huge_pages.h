// Huge pages for large outputs: in new memory, a page fault every 4 KB costs more than most ops.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>

#include "common/format.h"

namespace dalle_fast {

// To be called before anything is written. Only advice: no result depends on it.
inline void advise_huge(void* data, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline void advise_huge(void* data, Format format, int64_t elements) {
  with_format(format, [&](auto element) { advise_huge(data, elements * sizeof(element)); });
}

}  // namespace dalle_fast
