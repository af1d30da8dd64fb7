// residual_layer_norm, scale_gradient, unscale_gradient, update_scales: checks, outputs, and the choice of a backend.
#include "resblock/resblock.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/dispatch.h"

namespace dalle_fast {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Resblocks compute in 16 bits or in the stream's type.
Format checked_format(ScalarType dtype, const char* name, ScalarType stream) {
  check_dtype(dtype, name, {stream, ScalarType::BFloat16, ScalarType::Half});
  return format_of(dtype, name);
}

void check_scaling(const OptionalTensor& scale_in, const OptionalTensor& scale_out, const OptionalTensor& nonfinite,
                   const Tensor& like) {
  if (scale_in) check_elements(*scale_in, "scale_in", ScalarType::Float, 1, like);
  if (scale_out) check_elements(*scale_out, "scale_out", ScalarType::Float, 1, like);
  if (nonfinite) check_elements(*nonfinite, "nonfinite", ScalarType::Int, 1, like);
}

// The leading dimensions of x [..., D] with a last dimension of 1.
std::vector<int64_t> row_sizes(const Tensor& x) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = 1;
  return sizes;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& branch, const Tensor& weight,
                                                   const Tensor& bias, double eps, ScalarType dtype) {
  const ScalarType stream = x.scalar_type();
  STD_TORCH_CHECK(x.dim() >= 1 && x.numel() > 0, "x: expected a non-empty [..., D], got ", list_of(x.sizes()));
  check_contiguous(x, "x");
  const int64_t width = x.size(x.dim() - 1);
  const ScalarType branch_dtype = branch ? branch->scalar_type() : stream;
  const Format branch_format = checked_format(branch_dtype, "branch", stream);
  const Format normed_format = checked_format(dtype, "dtype", stream);
  if (branch) check_contiguous(*branch, "branch", branch_dtype, x.sizes(), x);
  check_contiguous(weight, "weight", stream, {width}, x);
  check_contiguous(bias, "bias", stream, {width}, x);
  Tensor total = branch ? torch::stable::new_empty(x, x.sizes()) : torch::stable::new_empty(x, {0});
  Tensor normed = torch::stable::new_empty(x, x.sizes(), dtype);
  Tensor mean = torch::stable::new_empty(x, row_sizes(x));
  Tensor rstd = torch::stable::new_empty(x, row_sizes(x));
  ResidualLayerNorm<T> params;
  params.rows = x.numel() / width;
  params.width = width;
  params.eps = eps;
  params.x = input<T>(x);
  params.branch = input<void>(branch);
  params.branch_format = branch_format;
  params.weight = input<T>(weight);
  params.bias = input<T>(bias);
  params.total = output<T>(total);
  params.normed = normed.mutable_data_ptr();
  params.normed_format = normed_format;
  params.mean = output<T>(mean);
  params.rstd = output<T>(rstd);
  DF_RUN(residual_layer_norm, x, params);
  return {total, normed, mean, rstd};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const OptionalTensor& grad_total, const Tensor& grad_normed,
                                                    const Tensor& total, const Tensor& weight, const Tensor& mean,
                                                    const Tensor& rstd, ScalarType branch_dtype,
                                                    const OptionalTensor& scale_in, const OptionalTensor& scale_out,
                                                    const OptionalTensor& nonfinite) {
  const ScalarType stream = total.scalar_type(), normed_dtype = grad_normed.scalar_type();
  STD_TORCH_CHECK(total.dim() >= 1 && total.numel() > 0, "total: expected a non-empty [..., D], got ",
                  list_of(total.sizes()));
  check_contiguous(total, "total");
  const int64_t width = total.size(total.dim() - 1), rows = total.numel() / width;
  const Format normed_format = checked_format(normed_dtype, "grad_normed", stream);
  const Format branch_format = checked_format(branch_dtype, "branch_dtype", stream);
  if (grad_total) check_contiguous(*grad_total, "grad_total", stream, total.sizes(), total);
  check_contiguous(grad_normed, "grad_normed", normed_dtype, total.sizes(), total);
  check_contiguous(weight, "weight", stream, {width}, total);
  check_contiguous(mean, "mean", stream, row_sizes(total), total);
  check_contiguous(rstd, "rstd", stream, row_sizes(total), total);
  check_scaling(scale_in, scale_out, nonfinite, total);
  Tensor grad_x = torch::stable::new_empty(total, total.sizes());
  const bool own_grad_branch = branch_dtype != stream || scale_out;
  Tensor grad_branch = own_grad_branch ? torch::stable::new_empty(total, total.sizes(), branch_dtype)
                                       : torch::stable::new_empty(total, {0}, branch_dtype);
  Tensor grad_weight = torch::stable::new_empty(weight, weight.sizes());
  Tensor grad_bias = torch::stable::new_empty(weight, weight.sizes());
  ResidualLayerNormBackward<T> params;
  params.rows = rows;
  params.width = width;
  params.grad_total = input<T>(grad_total);
  params.grad_normed = grad_normed.const_data_ptr();
  params.normed_format = normed_format;
  params.scale_in = input<float>(scale_in);
  params.scale_out = input<float>(scale_out);
  params.nonfinite = nonfinite ? output<int32_t>(*nonfinite) : nullptr;
  params.total = input<T>(total);
  params.weight = input<T>(weight);
  params.mean = input<T>(mean);
  params.rstd = input<T>(rstd);
  params.grad_x = output<T>(grad_x);
  params.grad_branch = own_grad_branch ? grad_branch.mutable_data_ptr() : nullptr;
  params.branch_format = branch_format;
  params.grad_weight = output<T>(grad_weight);
  params.grad_bias = output<T>(grad_bias);
#ifdef DALLE_FAST_CUDA
  std::optional<Tensor> partials;
  if (on_cuda(total)) {
    launch_on_device_of(total, "residual_layer_norm_backward", [&](cudaStream_t) { return count_partials(&params); });
    partials = torch::stable::new_empty(weight, {params.partial_count, 2, width});
    params.partials = output<T>(*partials);
  }
#endif
  DF_RUN(residual_layer_norm_backward, total, params);
  return {grad_x, grad_branch, grad_weight, grad_bias};
}

bool is_double(const Tensor& stream, const char* name) {
  check_dtype(stream.scalar_type(), name, {ScalarType::Float, ScalarType::Double});
  return stream.scalar_type() == ScalarType::Double;
}

// The scaling is for the backward alone; autograd takes it from the arguments.
std::tuple<Tensor, Tensor, Tensor, Tensor> residual_layer_norm(const Tensor& x, const OptionalTensor& branch,
                                                               const Tensor& weight, const Tensor& bias, double eps,
                                                               ScalarType dtype, const OptionalTensor& scale_in,
                                                               const OptionalTensor& scale_out,
                                                               const OptionalTensor& nonfinite) {
  check_scaling(scale_in, scale_out, nonfinite, x);
  STD_TORCH_CHECK(eps > 0 && std::isfinite(eps), "eps: expected a finite positive number, got ", eps);
  return is_double(x, "x") ? forward<double>(x, branch, weight, bias, eps, dtype)
                           : forward<float>(x, branch, weight, bias, eps, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_layer_norm_backward(
    const OptionalTensor& grad_total, const Tensor& grad_normed, const Tensor& total, const Tensor& weight,
    const Tensor& mean, const Tensor& rstd, ScalarType branch_dtype, const OptionalTensor& scale_in,
    const OptionalTensor& scale_out, const OptionalTensor& nonfinite) {
  return is_double(total, "total") ? backward<double>(grad_total, grad_normed, total, weight, mean, rstd, branch_dtype,
                                                      scale_in, scale_out, nonfinite)
                                   : backward<float>(grad_total, grad_normed, total, weight, mean, rstd, branch_dtype,
                                                     scale_in, scale_out, nonfinite);
}

// From `in` to `out`, one of them float32.
GradientScaling scaling(const Tensor& in, const Tensor& scale, const Tensor& out) {
  GradientScaling params;
  params.in_format = checked_format(in.scalar_type(), "grad", ScalarType::Float);
  params.out_format = checked_format(out.scalar_type(), "dtype", ScalarType::Float);
  check_contiguous(in, "grad");
  check_elements(scale, "scale", ScalarType::Float, 1, in);
  params.n = in.numel();
  params.in = in.const_data_ptr();
  params.scale = input<float>(scale);
  params.out = out.mutable_data_ptr();
  return params;
}

Tensor scale_gradient(const Tensor& grad, const Tensor& scale, ScalarType dtype) {
  check_dtype(grad.scalar_type(), "grad", {ScalarType::Float});
  const Tensor out = torch::stable::new_empty(grad, grad.sizes(), dtype);
  const GradientScaling params = scaling(grad, scale, out);
  DF_RUN(scale_gradient, grad, params);
  return out;
}

Tensor unscale_gradient(const Tensor& grad, const Tensor& scale) {
  const Tensor out = torch::stable::new_empty(grad, grad.sizes(), ScalarType::Float);
  const GradientScaling params = scaling(grad, scale, out);
  DF_RUN(unscale_gradient, grad, params);
  return out;
}

void update_scales(const Tensor& scale, const Tensor& since_division, const Tensor& nonfinite, int64_t replicas) {
  const int64_t n = scale.numel();
  check_contiguous(scale, "scale", ScalarType::Float, {n}, scale);
  check_contiguous(since_division, "since_division", ScalarType::Int, {n}, scale);
  check_contiguous(nonfinite, "nonfinite", ScalarType::Int, {n}, scale);
  check_apart({scale, since_division, nonfinite}, {}, "scale, since_division, nonfinite");
  STD_TORCH_CHECK(replicas >= 1, "replicas: expected 1 or more, got ", replicas);
  ScaleUpdate params;
  params.n = n;
  params.scale = output<float>(scale);
  params.since_division = output<int32_t>(since_division);
  params.nonfinite = output<int32_t>(nonfinite);
  params.replicas = static_cast<float>(replicas);
  DF_RUN(update_scales, scale, params);
}

}  // namespace
}  // namespace dalle_fast

DF_REGISTER(m) {
  m.impl("residual_layer_norm", TORCH_BOX(&dalle_fast::residual_layer_norm));
  m.impl("residual_layer_norm_backward", TORCH_BOX(&dalle_fast::residual_layer_norm_backward));
  m.impl("scale_gradient", TORCH_BOX(&dalle_fast::scale_gradient));
  m.impl("unscale_gradient", TORCH_BOX(&dalle_fast::unscale_gradient));
  m.impl("update_scales", TORCH_BOX(&dalle_fast::update_scales));
}
