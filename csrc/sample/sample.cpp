// sample: checks, output, and the choice of a backend.
#include "sample/sample.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "common/dispatch.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The value of a tensor of one int64 where logits are.
const int64_t* checked_scalar(const Tensor& x, const char* name, const Tensor& logits) {
  STD_TORCH_CHECK(x.device() == logits.device() && x.scalar_type() == ScalarType::Long && x.numel() == 1, name,
                  ": expected one int64 on ", device_name(logits), ", got ", x.numel(), " of ",
                  torch::headeronly::toString(x.scalar_type()), " on ", device_name(x));
  return static_cast<const int64_t*>(x.const_data_ptr());
}

Tensor sample(const Tensor& logits, const Tensor& seed, const Tensor& first, double temperature, int64_t top_k,
              double top_p, int64_t pitch) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.numel() > 0 && (logits.size(1) == 1 || logits.stride(1) == 1),
                  "logits: expected a non-empty [C, K] with contiguous rows");
  const int64_t rows = logits.size(0), codes = logits.size(1);
  const ScalarType dtype = logits.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "logits: expected float32, bfloat16 or float16, got ", torch::headeronly::toString(dtype));
  const Format format = format_of(dtype, "logits");
  STD_TORCH_CHECK(temperature > 0 && std::isfinite(temperature), "temperature: expected a finite number above 0, got ",
                  temperature);
  STD_TORCH_CHECK(top_k >= 1 && top_p > 0, "top_k, top_p: expected 1 or more and above 0, got ", top_k, ", ", top_p);
  STD_TORCH_CHECK(pitch >= codes, "pitch: expected ", codes, " or more, got ", pitch);
  const int64_t *seed_at = checked_scalar(seed, "seed", logits), *first_at = checked_scalar(first, "first", logits);
  Tensor out = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  auto* drawn = static_cast<int64_t*>(out.mutable_data_ptr());
  const Sample params{
      rows,  codes, logits.const_data_ptr(), format, logits.stride(0), seed_at, first_at, temperature, top_k, top_p,
      pitch, drawn};
  const bool readable = logits.is_cpu();  // without waiting for the device
  STD_TORCH_CHECK(!readable || *first_at >= 0, "first: expected 0 or more, got ", *first_at);
  DF_RUN(sample, logits, params);
  for (int64_t row = 0; readable && row < rows; ++row) {
    STD_TORCH_CHECK(drawn[row] >= 0, "logits: expected no NaN and a finite largest value in every row, not so in row ",
                    row);
  }
  return out;
}

}  // namespace
}  // namespace dalle_fast

DF_REGISTER(m) { m.impl("sample", TORCH_BOX(&dalle_fast::sample)); }
