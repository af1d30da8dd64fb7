// Rows of standard Gumbel noise: element `first` + i of the seed's stream, as the reference draws it.
#pragma once

#include <cstdint>

namespace dalle_fast {

void gumbel_noise_cpu(uint64_t seed, int64_t first, int64_t n, float* noise);

}  // namespace dalle_fast
