// philox_uniform: checks, output, and the choice of a backend.
#include "gumbel/philox_uniform.h"

#include <torch/csrc/stable/ops.h>

#include "common/dispatch.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor philox_uniform(const Tensor& seed, int64_t first, int64_t n) {
  STD_TORCH_CHECK(first >= 0 && n >= 0, "first, n: expected at least 0, got ", first, ", ", n);
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "seed: expected one int64");
  Tensor drawn = torch::stable::new_empty(seed, {n}, ScalarType::Float);
  PhiloxUniform params;
  params.seed = static_cast<const int64_t*>(seed.const_data_ptr());
  params.first = first;
  params.n = n;
  params.out = static_cast<float*>(drawn.mutable_data_ptr());
  DF_RUN(philox_uniform, seed, params);
  return drawn;
}

}  // namespace
}  // namespace dalle_fast

DF_REGISTER(m) { m.impl("philox_uniform", TORCH_BOX(&dalle_fast::philox_uniform)); }
