// One draw a row from logits: parameters of the kernels, without torch.
#pragma once

#include <cstdint>

namespace dalle_fast {

struct Sample {
  int64_t rows, codes;
  const void* logits;  // [rows, codes], float32 or bfloat16
  bool bfloat16;
  int64_t row_stride;  // in elements; codes lie side by side
  uint64_t seed;
  double temperature;
  int64_t top_k;         // codes or more: no limit
  double top_p;          // 1 or more: no limit
  int64_t first, pitch;  // the noise of row r, code i is element first + r * pitch + i of the seed's stream
  int64_t* out;          // [rows]; -1 where a row has NaN, or no finite largest logit
};

void sample_cpu(const Sample& params);

}  // namespace dalle_fast
