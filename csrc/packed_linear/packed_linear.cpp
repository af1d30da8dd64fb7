// pack_linear, packed_linear: checks and outputs.
#include "packed_linear/packed_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"

namespace dalle_fast {
namespace {

WeightFormat checked_format(ScalarType dtype, const char* name) {
  check_dtype(dtype, name, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Char});
  return dtype == ScalarType::Float      ? WeightFormat::kFloat32
         : dtype == ScalarType::BFloat16 ? WeightFormat::kBFloat16
                                         : WeightFormat::kInt8;
}

// The panels of a weight [out, in]: [panels, lines of a panel, weights of a line].
std::vector<int64_t> panel_sizes(int64_t out, int64_t in, WeightFormat format) {
  return {divide_up(out, kPanelOutputs), divide_up(in, line_depth(format)), line_depth(format) * kPanelOutputs};
}

std::tuple<Tensor, Tensor> pack_linear(const Tensor& weight, ScalarType dtype) {
  const WeightFormat format = checked_format(dtype, "dtype");
  check_rank(weight, "weight", 2, "[out, in]");
  check_contiguous(weight, "weight", ScalarType::Float, weight.sizes(), weight);
  const int64_t out = weight.size(0), in = weight.size(1);
  Tensor panels = torch::stable::new_empty(weight, panel_sizes(out, in, format), dtype);
  Tensor scales = torch::stable::new_empty(weight, {format == WeightFormat::kInt8 ? out : 0});
  PackLinear params;
  params.in_features = in;
  params.out_features = out;
  params.weight = input<float>(weight);
  params.format = format;
  params.panels = panels.mutable_data_ptr();
  params.scales = output<float>(scales);
  pack_linear_cpu(params);
  return {panels, scales};
}

// contiguous() only where needed: a call through torch's dispatcher costs as much as all of the checks.
Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

Tensor packed_linear(const Tensor& x, const Tensor& panels, const Tensor& scales, const std::optional<Tensor>& bias,
                     int64_t out_features) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0, "x: expected [..., in], got ", list_of(x.sizes()));
  STD_TORCH_CHECK(out_features > 0, "out_features: expected 1 or more, got ", out_features);
  const int64_t in = x.size(-1);
  const WeightFormat format = checked_format(panels.scalar_type(), "panels");
  const Tensor rows = dense(x);
  check(rows, "x", ScalarType::Float, x.sizes(), panels);
  check_contiguous(panels, "panels", panels.scalar_type(), panel_sizes(out_features, in, format), panels);
  check_contiguous(scales, "scales", ScalarType::Float, {format == WeightFormat::kInt8 ? out_features : 0}, panels);
  std::optional<Tensor> addend;
  if (bias) {
    check(*bias, "bias", ScalarType::Float, {out_features}, panels);
    addend = dense(*bias);
  }
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out_features;
  Tensor out = torch::stable::new_empty(x, sizes);
  PackedLinear params;
  params.rows = x.numel() / in;
  params.in_features = in;
  params.out_features = out_features;
  params.x = input<float>(rows);
  params.format = format;
  params.panels = panels.const_data_ptr();
  params.scales = input<float>(scales);
  params.bias = input<float>(addend);
  params.out = output<float>(out);
  packed_linear_cpu(params);
  return out;
}

}  // namespace
}  // namespace dalle_fast

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) {
  m.impl("pack_linear", TORCH_BOX(&dalle_fast::pack_linear));
  m.impl("packed_linear", TORCH_BOX(&dalle_fast::packed_linear));
}
