// sample: checks, output, and the choice of a backend.
#include "sample/sample.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>

#include "common/checks.h"
#include "common/dispatch.h"

namespace dalle_fast {
namespace {

Tensor sample(const Tensor& logits, const Tensor& seed, const Tensor& first, double temperature, int64_t top_k,
              double top_p, int64_t pitch) {
  check_rank(logits, "logits", 2, "[C, K]");
  const int64_t rows = logits.size(0), codes = logits.size(1);
  check_int(rows, "logits: C");
  check_int(codes, "logits: K");
  STD_TORCH_CHECK(codes == 1 || logits.stride(1) == 1, "logits: expected contiguous rows, got strides ",
                  list_of(logits.strides()));
  check_dtype(logits.scalar_type(), "logits", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  STD_TORCH_CHECK(temperature > 0 && std::isfinite(temperature), "temperature: expected a finite number above 0, got ",
                  temperature);
  STD_TORCH_CHECK(top_k >= 1 && top_p > 0, "top_k, top_p: expected 1 or more and above 0, got ", top_k, ", ", top_p);
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  STD_TORCH_CHECK(pitch >= codes && pitch <= kMost / rows, "pitch: expected ", codes, " to ", kMost / rows, ", got ",
                  pitch);
  check_elements(seed, "seed", ScalarType::Long, 1, logits);
  check_elements(first, "first", ScalarType::Long, 1, logits);
  Tensor out = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  Sample params;
  params.rows = rows;
  params.codes = codes;
  params.logits = logits.const_data_ptr();
  params.format = format_of(logits.scalar_type(), "logits");
  params.row_stride = logits.stride(0);
  params.seed = input<int64_t>(seed);
  params.first = input<int64_t>(first);
  params.temperature = temperature;
  params.top_k = top_k;
  params.top_p = top_p;
  params.pitch = pitch;
  params.out = output<int64_t>(out);
  const bool readable = logits.is_cpu();  // without waiting for the device
  STD_TORCH_CHECK(!readable || *params.first >= 0, "first: expected 0 or more, got ", *params.first);
  STD_TORCH_CHECK(!readable || *params.first <= kMost - rows * pitch, "first: expected at most ", kMost - rows * pitch,
                  ", got ", *params.first);
  DF_RUN(sample, logits, params);
  for (int64_t row = 0; readable && row < rows; ++row) {
    STD_TORCH_CHECK(params.out[row] >= 0,
                    "logits: expected no NaN and a finite largest value in every row, not so in row ", row);
  }
  return out;
}

}  // namespace
}  // namespace dalle_fast

DF_REGISTER(m) { m.impl("sample", TORCH_BOX(&dalle_fast::sample)); }
