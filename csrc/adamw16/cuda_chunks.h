// Many tensors as one row of chunks, so that one launch takes them all. The table is a kernel argument, by value: a
// captured graph then owns it, and no buffer is filled from the host.
#pragma once

#include "cuda/device.h"

namespace dalle_fast {

template <int tensors_at_most, int elements>
struct TensorChunks {
  static constexpr int kTensors = tensors_at_most;
  static constexpr int kElements = elements;  // of a chunk
  static_assert(elements <= UINT16_MAX);

  int tensors = 0;
  uint32_t first[kTensors + 1] = {};  // first chunk of each tensor; after the last tensor, the number of chunks
  uint16_t last[kTensors] = {};       // elements of a tensor's last chunk

  void add(int64_t n) {
    const int64_t chunks = (n + elements - 1) / elements;
    last[tensors] = static_cast<uint16_t>(n - (chunks - 1) * elements);
    first[tensors + 1] = first[tensors] + static_cast<uint32_t>(chunks);
    ++tensors;
  }

  DF_HOST_DEVICE uint32_t total() const { return first[tensors]; }

  DF_DEVICE int tensor_of(uint32_t chunk) const {
    int low = 0, high = tensors;  // of several tensors that begin at one chunk, all but the last are empty
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first[middle] <= chunk) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  DF_DEVICE int64_t begin_of(uint32_t chunk, int tensor) const {
    return static_cast<int64_t>(chunk - first[tensor]) * elements;
  }

  DF_DEVICE int size_of(uint32_t chunk, int tensor) const {
    return chunk + 1 == first[tensor + 1] ? last[tensor] : elements;
  }
};

}  // namespace dalle_fast
