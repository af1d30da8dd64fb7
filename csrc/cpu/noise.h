// Rows of random numbers: elements `first` ... `first` + n of the seed's stream, as the reference draws them.
#pragma once

#include <cstdint>

namespace dalle_fast {

void uniform_cpu(uint64_t seed, int64_t first, int64_t n, float* out);       // uniform in (0, 1)
void gumbel_noise_cpu(uint64_t seed, int64_t first, int64_t n, float* out);  // standard Gumbel

}  // namespace dalle_fast
