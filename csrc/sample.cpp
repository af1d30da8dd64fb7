// sample: checks, output, and the choice of a backend.
#include "sample.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor sample(const Tensor& logits, const Tensor& seed, double temperature, int64_t top_k, double top_p, int64_t first,
              int64_t pitch) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.numel() > 0 && (logits.size(1) == 1 || logits.stride(1) == 1),
                  "logits: expected a non-empty [C, K] with contiguous rows");
  const int64_t rows = logits.size(0), codes = logits.size(1);
  const ScalarType dtype = logits.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "logits: expected float32 or bfloat16, got ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(seed.is_cpu() && seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "seed: expected one int64 on the CPU");
  STD_TORCH_CHECK(temperature > 0 && std::isfinite(temperature), "temperature: expected a finite number above 0, got ",
                  temperature);
  STD_TORCH_CHECK(top_k >= 1 && top_p > 0, "top_k, top_p: expected 1 or more and above 0, got ", top_k, ", ", top_p);
  STD_TORCH_CHECK(first >= 0 && pitch >= codes, "first, pitch: expected 0 or more and ", codes, " or more, got ", first,
                  ", ", pitch);
  Tensor out = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  auto* drawn = static_cast<int64_t*>(out.mutable_data_ptr());
  sample_cpu({rows, codes, logits.const_data_ptr(), dtype == ScalarType::BFloat16, logits.stride(0),
              static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr())), temperature, top_k, top_p,
              first, pitch, drawn});
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(drawn[row] >= 0, "logits: expected no NaN and a finite largest value in every row, not so in row ",
                    row);
  }
  return out;
}

}  // namespace
}  // namespace dalle_fast

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) { m.impl("sample", TORCH_BOX(&dalle_fast::sample)); }
