// A row of the noise that all CPU kernels draw.
#include "cpu/noise.h"
#include "gumbel/philox_uniform.h"

namespace dalle_fast {

void philox_uniform_cpu(const PhiloxUniform& params) {
  uniform_noise_cpu(static_cast<uint64_t>(*params.seed), params.first, params.n, params.out);
}

}  // namespace dalle_fast
