// adamw16: checks and the choice of a backend.
#include "adamw16.h"

#include <cmath>

#include "backend.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(const Tensor& x, const char* name, ScalarType dtype, const Tensor& param) {
  STD_TORCH_CHECK(x.device() == param.device() && x.scalar_type() == dtype && x.numel() == param.numel(), name,
                  ": expected ", param.numel(), " elements of ", torch::headeronly::toString(dtype), " on ",
                  device_name(param), ", got ", x.numel(), " of ", torch::headeronly::toString(x.scalar_type()), " on ",
                  device_name(x));
  for (int64_t d = 0; d < param.dim(); ++d) {
    STD_TORCH_CHECK(x.dim() == param.dim() && (param.size(d) == 1 || x.stride(d) == param.stride(d)), name,
                    ": expected the memory layout of param");
  }
}

void adamw16(const Tensor& param, const Tensor& grad, const Tensor& mean, const Tensor& variance, int64_t step,
             double lr, double beta1, double beta2, double eps, double weight_decay) {
  check(param, "param", ScalarType::Float, param);
  check(grad, "grad", ScalarType::Float, param);
  check(mean, "mean", ScalarType::Short, param);
  check(variance, "variance", ScalarType::Short, param);
  STD_TORCH_CHECK(step >= 1, "step: expected at least 1, got ", step);
  AdamW16 params;
  params.n = param.numel();
  params.param = static_cast<float*>(param.mutable_data_ptr());
  params.grad = static_cast<const float*>(grad.const_data_ptr());
  params.mean = static_cast<uint16_t*>(mean.mutable_data_ptr());
  params.variance = static_cast<uint16_t*>(variance.mutable_data_ptr());
  params.lr = static_cast<float>(lr);
  params.eps = static_cast<float>(eps);
  params.beta2 = static_cast<float>(beta2);
  params.mean_rate = static_cast<float>(1 - beta1);
  params.variance_rate = static_cast<float>(1 - beta2);
  params.mean_correction = static_cast<float>(1 - std::pow(beta1, step));
  params.variance_correction = static_cast<float>(1 - std::pow(beta2, step));
  params.decay = static_cast<float>(1 - lr * weight_decay);
  DF_RUN(adamw16, param, params);
}

}  // namespace
}  // namespace dalle_fast

DF_REGISTER(m) { m.impl("adamw16", TORCH_BOX(&dalle_fast::adamw16)); }
