// residual_layer_norm, scale_gradient, unscale_gradient, update_scales: checks, outputs, and the choice of a backend.
#include "resblock/resblock.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/dispatch.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// `like` says on which device.
void check(const Tensor& x, const char* name, int64_t numel, const Tensor& like) {
  STD_TORCH_CHECK(x.device() == like.device() && x.is_contiguous() && x.numel() == numel, name, ": expected ", numel,
                  " contiguous elements on ", device_name(like), ", got ", x.numel(), " on ", device_name(x));
}

void check(const Tensor& x, const char* name, int64_t numel, ScalarType dtype, const Tensor& like) {
  check(x, name, numel, like);
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, ": expected ", torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(x.scalar_type()));
}

// Resblocks compute in 16 bits or in the stream's type.
void check_format(ScalarType dtype, const char* name, ScalarType stream) {
  STD_TORCH_CHECK(dtype == stream || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name, ": expected ",
                  torch::headeronly::toString(stream), ", bfloat16 or float16, got ",
                  torch::headeronly::toString(dtype));
}

void check_scaling(const OptionalTensor& scale_in, const OptionalTensor& scale_out, const OptionalTensor& nonfinite,
                   const Tensor& like) {
  if (scale_in) check(*scale_in, "scale_in", 1, ScalarType::Float, like);
  if (scale_out) check(*scale_out, "scale_out", 1, ScalarType::Float, like);
  if (nonfinite) check(*nonfinite, "nonfinite", 1, ScalarType::Int, like);
}

template <typename T>
const T* data_or_null(const OptionalTensor& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

Tensor new_output(const Tensor& like, ScalarType dtype) {
  return with_huge_pages(torch::stable::new_empty(like, like.sizes(), dtype));
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
  STD_TORCH_CHECK(x.dim() >= 1 && x.numel() > 0, "x: expected a non-empty [..., D], got ", x.numel(), " elements");
  const int64_t width = x.size(x.dim() - 1);
  check(x, "x", x.numel(), x);
  if (branch) {
    check(*branch, "branch", x.numel(), x);
    check_format(branch->scalar_type(), "branch", stream);
  }
  check(weight, "weight", width, stream, x);
  check(bias, "bias", width, stream, x);
  check_format(dtype, "dtype", stream);
  Tensor total = branch ? new_output(x, stream) : torch::stable::new_empty(x, {0});
  Tensor normed = new_output(x, dtype);
  Tensor mean = torch::stable::new_empty(x, row_sizes(x));
  Tensor rstd = torch::stable::new_empty(x, row_sizes(x));
  ResidualLayerNorm<T> params;
  params.rows = x.numel() / width;
  params.width = width;
  params.eps = eps;
  params.x = static_cast<const T*>(x.const_data_ptr());
  params.branch = data_or_null<void>(branch);
  params.branch_format = format_of(branch ? branch->scalar_type() : stream, "branch");
  params.weight = static_cast<const T*>(weight.const_data_ptr());
  params.bias = static_cast<const T*>(bias.const_data_ptr());
  params.total = static_cast<T*>(total.mutable_data_ptr());
  params.normed = normed.mutable_data_ptr();
  params.normed_format = format_of(dtype, "dtype");
  params.mean = static_cast<T*>(mean.mutable_data_ptr());
  params.rstd = static_cast<T*>(rstd.mutable_data_ptr());
  DF_RUN(residual_layer_norm, x, params);
  return {total, normed, mean, rstd};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const OptionalTensor& grad_total, const Tensor& grad_normed,
                                                    const Tensor& total, const Tensor& weight, const Tensor& mean,
                                                    const Tensor& rstd, ScalarType branch_dtype,
                                                    const OptionalTensor& scale_in, const OptionalTensor& scale_out,
                                                    const OptionalTensor& nonfinite) {
  const ScalarType stream = total.scalar_type();
  const int64_t width = weight.numel(), rows = mean.numel();
  STD_TORCH_CHECK(total.numel() > 0, "total: expected a non-empty [..., D]");
  check(total, "total", rows * width, total);
  if (grad_total) check(*grad_total, "grad_total", rows * width, stream, total);
  check(grad_normed, "grad_normed", rows * width, total);
  check_format(grad_normed.scalar_type(), "grad_normed", stream);
  check(weight, "weight", width, stream, total);
  check(mean, "mean", rows, stream, total);
  check(rstd, "rstd", rows, stream, total);
  check_format(branch_dtype, "branch_dtype", stream);
  check_scaling(scale_in, scale_out, nonfinite, total);
  Tensor grad_x = new_output(total, stream);
  const bool own_grad_branch = branch_dtype != stream || scale_out;
  Tensor grad_branch =
      own_grad_branch ? new_output(total, branch_dtype) : torch::stable::new_empty(total, {0}, branch_dtype);
  Tensor grad_weight = torch::stable::new_empty(weight, weight.sizes());
  Tensor grad_bias = torch::stable::new_empty(weight, weight.sizes());
  ResidualLayerNormBackward<T> params;
  params.rows = rows;
  params.width = width;
  params.grad_total = data_or_null<T>(grad_total);
  params.grad_normed = grad_normed.const_data_ptr();
  params.normed_format = format_of(grad_normed.scalar_type(), "grad_normed");
  params.scale_in = data_or_null<float>(scale_in);
  params.scale_out = data_or_null<float>(scale_out);
  params.nonfinite = nonfinite ? static_cast<int32_t*>(nonfinite->mutable_data_ptr()) : nullptr;
  params.total = static_cast<const T*>(total.const_data_ptr());
  params.weight = static_cast<const T*>(weight.const_data_ptr());
  params.mean = static_cast<const T*>(mean.const_data_ptr());
  params.rstd = static_cast<const T*>(rstd.const_data_ptr());
  params.grad_x = static_cast<T*>(grad_x.mutable_data_ptr());
  params.grad_branch = own_grad_branch ? grad_branch.mutable_data_ptr() : nullptr;
  params.branch_format = format_of(branch_dtype, "branch_dtype");
  params.grad_weight = static_cast<T*>(grad_weight.mutable_data_ptr());
  params.grad_bias = static_cast<T*>(grad_bias.mutable_data_ptr());
#ifdef DALLE_FAST_CUDA
  Tensor partials;
  if (on_cuda(total)) {
    launch_on_device_of(total, "residual_layer_norm_backward", [&](cudaStream_t) { return count_partials(&params); });
    partials = torch::stable::new_empty(weight, {params.partial_count, 2, width});
    params.partials = static_cast<T*>(partials.mutable_data_ptr());
  }
#endif
  DF_RUN(residual_layer_norm_backward, total, params);
  return {grad_x, grad_branch, grad_weight, grad_bias};
}

bool is_double(const Tensor& stream) {
  const ScalarType dtype = stream.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "residual stream: expected float32 or float64, got ", torch::headeronly::toString(dtype));
  return dtype == ScalarType::Double;
}

// The scaling concerns the backward alone; autograd finds it among the arguments.
std::tuple<Tensor, Tensor, Tensor, Tensor> residual_layer_norm(const Tensor& x, const OptionalTensor& branch,
                                                               const Tensor& weight, const Tensor& bias, double eps,
                                                               ScalarType dtype, const OptionalTensor& scale_in,
                                                               const OptionalTensor& scale_out,
                                                               const OptionalTensor& nonfinite) {
  check_scaling(scale_in, scale_out, nonfinite, x);
  return is_double(x) ? forward<double>(x, branch, weight, bias, eps, dtype)
                      : forward<float>(x, branch, weight, bias, eps, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_layer_norm_backward(
    const OptionalTensor& grad_total, const Tensor& grad_normed, const Tensor& total, const Tensor& weight,
    const Tensor& mean, const Tensor& rstd, ScalarType branch_dtype, const OptionalTensor& scale_in,
    const OptionalTensor& scale_out, const OptionalTensor& nonfinite) {
  return is_double(total) ? backward<double>(grad_total, grad_normed, total, weight, mean, rstd, branch_dtype, scale_in,
                                             scale_out, nonfinite)
                          : backward<float>(grad_total, grad_normed, total, weight, mean, rstd, branch_dtype, scale_in,
                                            scale_out, nonfinite);
}

GradientScaling scaling(const Tensor& in, const Tensor& scale, Tensor& out) {
  check(in, "grad", in.numel(), in);
  check_format(in.scalar_type(), "grad", ScalarType::Float);
  check_format(out.scalar_type(), "dtype", ScalarType::Float);
  check(scale, "scale", 1, ScalarType::Float, in);
  GradientScaling params;
  params.n = in.numel();
  params.in = in.const_data_ptr();
  params.in_format = format_of(in.scalar_type(), "grad");
  params.scale = static_cast<const float*>(scale.const_data_ptr());
  params.out = out.mutable_data_ptr();
  params.out_format = format_of(out.scalar_type(), "dtype");
  return params;
}

Tensor scale_gradient(const Tensor& grad, const Tensor& scale, ScalarType dtype) {
  check(grad, "grad", grad.numel(), ScalarType::Float, grad);
  Tensor out = new_output(grad, dtype);
  const GradientScaling params = scaling(grad, scale, out);
  DF_RUN(scale_gradient, grad, params);
  return out;
}

Tensor unscale_gradient(const Tensor& grad, const Tensor& scale) {
  Tensor out = new_output(grad, ScalarType::Float);
  const GradientScaling params = scaling(grad, scale, out);
  DF_RUN(unscale_gradient, grad, params);
  return out;
}

void update_scales(const Tensor& scale, const Tensor& since_division, const Tensor& nonfinite, int64_t replicas) {
  const int64_t n = scale.numel();
  check(scale, "scale", n, ScalarType::Float, scale);
  check(since_division, "since_division", n, ScalarType::Int, scale);
  check(nonfinite, "nonfinite", n, ScalarType::Int, scale);
  STD_TORCH_CHECK(replicas >= 1, "replicas: expected at least 1, got ", replicas);
  ScaleUpdate params;
  params.n = n;
  params.scale = static_cast<float*>(scale.mutable_data_ptr());
  params.since_division = static_cast<int32_t*>(since_division.mutable_data_ptr());
  params.nonfinite = static_cast<int32_t*>(nonfinite.mutable_data_ptr());
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
