// Rows of random numbers: elements `first` ... `first` + n of the seed's stream, as the reference draws them.
#pragma once

#include <cstdint>

#include "common/rng.h"
#include "cpu/vec_math.h"

namespace dalle_fast {

void random_words(uint64_t seed, int64_t first, int64_t n, uint32_t* out);
void uniform_noise_cpu(uint64_t seed, int64_t first, int64_t n, float* out);  // in (0, 1)
void gumbel_noise_cpu(uint64_t seed, int64_t first, int64_t n, float* out);   // standard Gumbel

// -log u, of which the Gumbel noise is minus the logarithm.
DF_ALWAYS_INLINE float exponential_from_word(uint32_t word) { return -vec_log(uniform_from_word(word)); }
DF_ALWAYS_INLINE float gumbel_from_word(uint32_t word) { return -vec_log(exponential_from_word(word)); }

}  // namespace dalle_fast
