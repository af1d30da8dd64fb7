// pack_linear, packed_linear: checks, outputs, and the choice of a backend.
#include "packed_linear/packed_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

WeightFormat format_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return WeightFormat::kFloat32;
    case ScalarType::BFloat16:
      return WeightFormat::kBFloat16;
    case ScalarType::Char:
      return WeightFormat::kInt8;
    default:
      STD_TORCH_CHECK(false, "format: expected float32, bfloat16 or int8, got ", torch::headeronly::toString(dtype));
  }
}

int64_t element_size(WeightFormat format) { return kLine / (kPanel * line_depth(format)); }

void check(const Tensor& x, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == dtype, name, ": expected contiguous ",
                  torch::headeronly::toString(dtype), " on the CPU, got ",
                  torch::headeronly::toString(x.scalar_type()));
}

void check(const Tensor& x, const char* name, ScalarType dtype, int64_t numel) {
  check(x, name, dtype);
  STD_TORCH_CHECK(x.numel() == numel, name, ": expected ", numel, " elements, got ", x.numel());
}

std::tuple<Tensor, Tensor> pack_linear(const Tensor& weight, ScalarType dtype) {
  const WeightFormat format = format_of(dtype);
  check(weight, "weight", ScalarType::Float);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.numel() > 0, "weight: expected a non-empty [out, in]");
  const int64_t out = weight.size(0), in = weight.size(1);
  Tensor panels = torch::stable::new_empty(
      weight, {divide_up(out, kPanel), divide_up(in, line_depth(format)), kLine / element_size(format)}, dtype);
  Tensor scales = torch::stable::new_empty(weight, {format == WeightFormat::kInt8 ? out : 0});
  pack_linear_cpu({in, out, static_cast<const float*>(weight.const_data_ptr()), format, panels.mutable_data_ptr(),
                   static_cast<float*>(scales.mutable_data_ptr())});
  return {panels, scales};
}

// Without a call through torch's dispatcher where nothing is to be done: that costs as much as all of the checks.
Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

Tensor packed_linear(const Tensor& x, const Tensor& panels, const Tensor& scales, const std::optional<Tensor>& bias,
                     int64_t out_features) {
  const Tensor rows = dense(x);
  check(rows, "x", ScalarType::Float);
  STD_TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0, "x: expected [..., in]");
  STD_TORCH_CHECK(out_features > 0, "out_features: expected at least 1, got ", out_features);
  const int64_t in = x.size(-1);
  const WeightFormat format = format_of(panels.scalar_type());
  check(panels, "panels", panels.scalar_type(),
        divide_up(out_features, kPanel) * divide_up(in, line_depth(format)) * kLine / element_size(format));
  check(scales, "scales", ScalarType::Float, format == WeightFormat::kInt8 ? out_features : 0);
  std::optional<Tensor> addend;
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1, "bias: expected [out]");
    addend = dense(*bias);
    check(*addend, "bias", ScalarType::Float, out_features);
  }
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out_features;
  Tensor out = torch::stable::new_empty(x, sizes);
  packed_linear_cpu({x.numel() / in, in, out_features, static_cast<const float*>(rows.const_data_ptr()), format,
                     panels.const_data_ptr(), static_cast<const float*>(scales.const_data_ptr()),
                     addend ? static_cast<const float*>(addend->const_data_ptr()) : nullptr,
                     static_cast<float*>(out.mutable_data_ptr())});
  return out;
}

}  // namespace
}  // namespace dalle_fast

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) {
  m.impl("pack_linear", TORCH_BOX(&dalle_fast::pack_linear));
  m.impl("packed_linear", TORCH_BOX(&dalle_fast::packed_linear));
}
