// adamw16, gradient_norm: checks and the choice of a backend.
#include "adamw16/adamw16.h"

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/dispatch.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(const Tensor& x, const char* name, ScalarType dtype, int64_t numel, const Tensor& param) {
  STD_TORCH_CHECK(x.device() == param.device() && x.scalar_type() == dtype && x.numel() == numel, name, ": expected ",
                  numel, " elements of ", torch::headeronly::toString(dtype), " on ", device_name(param), ", got ",
                  x.numel(), " of ", torch::headeronly::toString(x.scalar_type()), " on ", device_name(x));
}

// x must be laid out as param.
void check(const Tensor& x, const char* name, ScalarType dtype, const Tensor& param) {
  check(x, name, dtype, param.numel(), param);
  for (int64_t d = 0; d < param.dim(); ++d) {
    STD_TORCH_CHECK(x.dim() == param.dim() && (param.size(d) == 1 || x.stride(d) == param.stride(d)), name,
                    ": expected the memory layout of param");
  }
}

template <typename T>
const T* checked_option(const std::optional<Tensor>& x, const char* name, ScalarType dtype, size_t numel,
                        const Tensor& param) {
  if (!x) return nullptr;
  check(*x, name, dtype, static_cast<int64_t>(numel), param);
  STD_TORCH_CHECK(x->is_contiguous(), name, ": expected contiguous memory");
  return static_cast<const T*>(x->const_data_ptr());
}

void adamw16(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& means,
             const std::vector<Tensor>& variances, const Tensor& step, const Tensor& lr, double beta1, double beta2,
             double eps, const Tensor& weight_decay, const std::optional<Tensor>& unscale,
             const std::optional<Tensor>& clip, const std::optional<Tensor>& skip) {
  const size_t n = params.size();
  STD_TORCH_CHECK(grads.size() == n && means.size() == n && variances.size() == n, "grads, means, variances: expected ",
                  n, " of each, as many as params");
  if (n == 0) return;
  std::vector<AdamW16Tensor> tensors;
  for (size_t i = 0; i < n; ++i) {
    const Tensor& param = params[i];
    check(param, "params", ScalarType::Float, param.numel(), params[0]);
    check(grads[i], "grads", ScalarType::Float, param);
    check(means[i], "means", ScalarType::Short, param);
    check(variances[i], "variances", ScalarType::Short, param);
    tensors.push_back({param.numel(), static_cast<float*>(param.mutable_data_ptr()),
                       static_cast<const float*>(grads[i].const_data_ptr()),
                       static_cast<uint16_t*>(means[i].mutable_data_ptr()),
                       static_cast<uint16_t*>(variances[i].mutable_data_ptr())});
  }
  check(step, "step", ScalarType::Long, 1, params[0]);
  check(lr, "lr", ScalarType::Float, 1, params[0]);
  AdamW16 all;
  all.tensors = static_cast<int64_t>(n);
  all.tensor = tensors.data();
  all.beta1 = beta1;
  all.beta2 = beta2;
  all.eps = eps;
  all.step = static_cast<const int64_t*>(step.const_data_ptr());
  all.lr = static_cast<const float*>(lr.const_data_ptr());
  all.weight_decay = checked_option<float>(weight_decay, "weight_decay", ScalarType::Float, n, params[0]);
  all.unscale = checked_option<float>(unscale, "unscale", ScalarType::Float, n, params[0]);
  all.clip = checked_option<float>(clip, "clip", ScalarType::Float, 1, params[0]);
  all.skip = checked_option<bool>(skip, "skip", ScalarType::Bool, n, params[0]);
  DF_RUN(adamw16, params[0], all);
}

std::tuple<Tensor, Tensor> gradient_norm(const std::vector<Tensor>& grads, const std::optional<Tensor>& unscale,
                                         const std::optional<Tensor>& skip) {
  STD_TORCH_CHECK(!grads.empty(), "grads: expected at least one tensor, got none");
  const Tensor& first = grads[0];
  const int64_t n = static_cast<int64_t>(grads.size());
  std::vector<GradientTensor> tensors;
  int64_t chunks = 0;
  for (const Tensor& grad : grads) {
    check(grad, "grads", ScalarType::Float, grad.numel(), first);
    STD_TORCH_CHECK(grad.is_contiguous(), "grads: expected contiguous memory");
    tensors.push_back({grad.numel(), static_cast<const float*>(grad.const_data_ptr())});
    chunks += norm_chunks(grad.numel());
  }
  Tensor norm = torch::stable::new_empty(first, {}, ScalarType::Float);
  Tensor skipped = torch::stable::new_empty(first, {n}, ScalarType::Bool);
  Tensor sums = torch::stable::new_empty(first, {chunks + n}, ScalarType::Double);
  GradientNorm all;
  all.tensors = n;
  all.chunks = chunks;
  all.tensor = tensors.data();
  all.unscale = checked_option<float>(unscale, "unscale", ScalarType::Float, grads.size(), first);
  all.skip = checked_option<bool>(skip, "skip", ScalarType::Bool, grads.size(), first);
  all.sums = static_cast<double*>(sums.mutable_data_ptr());
  all.norm = static_cast<float*>(norm.mutable_data_ptr());
  all.skipped = static_cast<bool*>(skipped.mutable_data_ptr());
  DF_RUN(gradient_norm, first, all);
  return {norm, skipped};
}

}  // namespace
}  // namespace dalle_fast

DF_REGISTER(m) {
  m.impl("adamw16", TORCH_BOX(&dalle_fast::adamw16));
  m.impl("gradient_norm", TORCH_BOX(&dalle_fast::gradient_norm));
}
