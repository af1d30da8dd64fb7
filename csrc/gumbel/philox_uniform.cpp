// philox_uniform: checks, output, and the choice of a backend.
#include "gumbel/philox_uniform.h"

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "common/checks.h"
#include "common/dispatch.h"

namespace dalle_fast {
namespace {

Tensor philox_uniform(const Tensor& seed, int64_t first, int64_t n) {
  STD_TORCH_CHECK(first >= 0 && n >= 0 && n <= std::numeric_limits<int64_t>::max() - first,
                  "first, n: expected 0 or more, and a sum of 63 bits, got ", first, ", ", n);
  check_elements(seed, "seed", ScalarType::Long, 1, seed);
  Tensor drawn = torch::stable::new_empty(seed, {n}, ScalarType::Float);
  PhiloxUniform params;
  params.seed = input<int64_t>(seed);
  params.first = first;
  params.n = n;
  params.out = output<float>(drawn);
  DF_RUN(philox_uniform, seed, params);
  return drawn;
}

}  // namespace
}  // namespace dalle_fast

DF_REGISTER(m) { m.impl("philox_uniform", TORCH_BOX(&dalle_fast::philox_uniform)); }
