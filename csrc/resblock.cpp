// residual_layer_norm, scale_gradient, unscale_gradient: checks, outputs, and the choice of a backend.
#include "resblock.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "backend.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Format format_of(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Float:
      return Format::kFloat32;
    case ScalarType::Double:
      return Format::kFloat64;
    case ScalarType::BFloat16:
      return Format::kBFloat16;
    case ScalarType::Half:
      return Format::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(dtype));
  }
}

void check(const Tensor& x, const char* name, int64_t numel) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.numel() == numel, name, ": expected ", numel,
                  " contiguous elements on the CPU, got ", x.numel());
}

void check(const Tensor& x, const char* name, int64_t numel, ScalarType dtype) {
  check(x, name, numel);
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, ": expected ", torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(x.scalar_type()));
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
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& branch, const Tensor& weight,
                                                   const Tensor& bias, double eps, ScalarType dtype) {
  const ScalarType stream = x.scalar_type();
  STD_TORCH_CHECK(x.dim() >= 1 && x.numel() > 0, "x: expected a non-empty [..., D], got ", x.numel(), " elements");
  const int64_t width = x.size(x.dim() - 1);
  check(x, "x", x.numel());
  check(branch, "branch", x.numel());
  check(weight, "weight", width, stream);
  check(bias, "bias", width, stream);
  Tensor total = new_output(x, stream);
  Tensor normed = new_output(x, dtype);
  Tensor mean = torch::stable::new_empty(x, row_sizes(x));
  Tensor rstd = torch::stable::new_empty(x, row_sizes(x));
  ResidualLayerNorm<T> params;
  params.rows = x.numel() / width;
  params.width = width;
  params.eps = eps;
  params.x = static_cast<const T*>(x.const_data_ptr());
  params.branch = branch.const_data_ptr();
  params.branch_format = format_of(branch.scalar_type(), "branch");
  params.weight = static_cast<const T*>(weight.const_data_ptr());
  params.bias = static_cast<const T*>(bias.const_data_ptr());
  params.total = static_cast<T*>(total.mutable_data_ptr());
  params.normed = normed.mutable_data_ptr();
  params.normed_format = format_of(dtype, "dtype");
  params.mean = static_cast<T*>(mean.mutable_data_ptr());
  params.rstd = static_cast<T*>(rstd.mutable_data_ptr());
  residual_layer_norm_cpu(params);
  return {total, normed, mean, rstd};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_total, const Tensor& grad_normed,
                                                    const Tensor& total, const Tensor& weight, const Tensor& mean,
                                                    const Tensor& rstd, ScalarType branch_dtype) {
  const ScalarType stream = total.scalar_type();
  const int64_t width = weight.numel(), rows = mean.numel();
  check(total, "total", rows * width);
  check(grad_total, "grad_total", rows * width, stream);
  check(grad_normed, "grad_normed", rows * width);
  check(weight, "weight", width, stream);
  check(mean, "mean", rows, stream);
  check(rstd, "rstd", rows, stream);
  Tensor grad_x = new_output(total, stream);
  const bool cast = branch_dtype != stream;
  Tensor grad_branch = cast ? new_output(total, branch_dtype) : torch::stable::new_empty(total, {0});
  Tensor grad_weight = torch::stable::new_empty(weight, weight.sizes());
  Tensor grad_bias = torch::stable::new_empty(weight, weight.sizes());
  ResidualLayerNormBackward<T> params;
  params.rows = rows;
  params.width = width;
  params.grad_total = static_cast<const T*>(grad_total.const_data_ptr());
  params.grad_normed = grad_normed.const_data_ptr();
  params.normed_format = format_of(grad_normed.scalar_type(), "grad_normed");
  params.total = static_cast<const T*>(total.const_data_ptr());
  params.weight = static_cast<const T*>(weight.const_data_ptr());
  params.mean = static_cast<const T*>(mean.const_data_ptr());
  params.rstd = static_cast<const T*>(rstd.const_data_ptr());
  params.grad_x = static_cast<T*>(grad_x.mutable_data_ptr());
  params.grad_branch = cast ? grad_branch.mutable_data_ptr() : nullptr;
  params.branch_format = format_of(branch_dtype, "branch_dtype");
  params.grad_weight = static_cast<T*>(grad_weight.mutable_data_ptr());
  params.grad_bias = static_cast<T*>(grad_bias.mutable_data_ptr());
  residual_layer_norm_backward_cpu(params);
  return {grad_x, grad_branch, grad_weight, grad_bias};
}

bool is_double(const Tensor& stream) {
  const ScalarType dtype = stream.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "residual stream: expected float32 or float64, got ", torch::headeronly::toString(dtype));
  return dtype == ScalarType::Double;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_layer_norm(const Tensor& x, const Tensor& branch,
                                                               const Tensor& weight, const Tensor& bias, double eps,
                                                               ScalarType dtype) {
  return is_double(x) ? forward<double>(x, branch, weight, bias, eps, dtype)
                      : forward<float>(x, branch, weight, bias, eps, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_layer_norm_backward(const Tensor& grad_total,
                                                                        const Tensor& grad_normed, const Tensor& total,
                                                                        const Tensor& weight, const Tensor& mean,
                                                                        const Tensor& rstd, ScalarType branch_dtype) {
  return is_double(total) ? backward<double>(grad_total, grad_normed, total, weight, mean, rstd, branch_dtype)
                          : backward<float>(grad_total, grad_normed, total, weight, mean, rstd, branch_dtype);
}

float scale_value(const Tensor& scale) {
  check(scale, "scale", 1, ScalarType::Float);
  return *static_cast<const float*>(scale.const_data_ptr());
}

Tensor scale_gradient(const Tensor& grad, const Tensor& scale, ScalarType dtype) {
  check(grad, "grad", grad.numel(), ScalarType::Float);
  Tensor out = new_output(grad, dtype);
  scale_gradient_cpu(static_cast<const float*>(grad.const_data_ptr()), scale_value(scale), grad.numel(),
                     out.mutable_data_ptr(), format_of(dtype, "dtype"));
  return out;
}

Tensor unscale_gradient(const Tensor& grad, const Tensor& scale) {
  check(grad, "grad", grad.numel());
  Tensor out = new_output(grad, ScalarType::Float);
  unscale_gradient_cpu(grad.const_data_ptr(), format_of(grad.scalar_type(), "grad"), scale_value(scale), grad.numel(),
                       static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace
}  // namespace dalle_fast

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) {
  m.impl("residual_layer_norm", TORCH_BOX(&dalle_fast::residual_layer_norm));
  m.impl("residual_layer_norm_backward", TORCH_BOX(&dalle_fast::residual_layer_norm_backward));
  m.impl("scale_gradient", TORCH_BOX(&dalle_fast::scale_gradient));
  m.impl("unscale_gradient", TORCH_BOX(&dalle_fast::unscale_gradient));
}
