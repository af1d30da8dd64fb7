// adamw16, gradient_norm: checks and the choice of a backend.
#include "adamw16/adamw16.h"

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/dispatch.h"

namespace dalle_fast {
namespace {

// x has the sizes and strides of param. Strides of size-1 dimensions and of empty tensors carry no meaning and are not
// compared.
void check_layout(const Tensor& x, const char* name, ScalarType dtype, const Tensor& param) {
  check(x, name, dtype, param.sizes(), param);
  for (int64_t d = 0; d < param.dim(); ++d) {
    STD_TORCH_CHECK(param.numel() == 0 || param.size(d) == 1 || x.stride(d) == param.stride(d), name,
                    ": expected the strides of params ", list_of(param.strides()), ", got ", list_of(x.strides()));
  }
}

void check_option(const std::optional<Tensor>& x, const char* name, ScalarType dtype, int64_t numel,
                  const Tensor& param) {
  if (x) check_elements(*x, name, dtype, numel, param);
}

void adamw16(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& means,
             const std::vector<Tensor>& variances, const Tensor& step, const Tensor& lr, double beta1, double beta2,
             double eps, const Tensor& weight_decay, const std::optional<Tensor>& unscale,
             const std::optional<Tensor>& clip, const std::optional<Tensor>& skip) {
  STD_TORCH_CHECK(grads.size() == params.size() && means.size() == params.size() && variances.size() == params.size(),
                  "grads, means, variances: expected ", params.size(), " of each, as many as params, got ",
                  grads.size(), ", ", means.size(), ", ", variances.size());
  if (params.empty()) return;
  const Tensor& first = params[0];
  const int64_t n = static_cast<int64_t>(params.size());
  std::vector<AdamW16Tensor> tensors(n);
  for (int64_t i = 0; i < n; ++i) {
    const Tensor& param = params[i];
    check(param, "params", ScalarType::Float, param.sizes(), first);
    check_dense(param, "params");
    check_layout(grads[i], "grads", ScalarType::Float, param);
    check_layout(means[i], "means", ScalarType::Short, param);
    check_layout(variances[i], "variances", ScalarType::Short, param);
    tensors[i].n = param.numel();
    tensors[i].param = output<float>(param);
    tensors[i].grad = input<float>(grads[i]);
    tensors[i].mean = output<uint16_t>(means[i]);
    tensors[i].variance = output<uint16_t>(variances[i]);
  }
  check_elements(step, "step", ScalarType::Long, 1, first);
  check_elements(lr, "lr", ScalarType::Float, 1, first);
  check_elements(weight_decay, "weight_decay", ScalarType::Float, n, first);
  check_option(unscale, "unscale", ScalarType::Float, n, first);
  check_option(clip, "clip", ScalarType::Float, 1, first);
  check_option(skip, "skip", ScalarType::Bool, n, first);
  std::vector<Tensor> written, read = {step, lr, weight_decay};
  for (const auto* tensors : {&params, &means, &variances}) {
    written.insert(written.end(), tensors->begin(), tensors->end());
  }
  read.insert(read.end(), grads.begin(), grads.end());
  for (const auto& option : {unscale, clip, skip}) {
    if (option) read.push_back(*option);
  }
  check_apart(written, read, "params, means, variances");
  AdamW16 all;
  all.tensors = n;
  all.tensor = tensors.data();
  all.beta1 = beta1;
  all.beta2 = beta2;
  all.eps = eps;
  all.step = input<int64_t>(step);
  all.lr = input<float>(lr);
  all.weight_decay = input<float>(weight_decay);
  all.unscale = input<float>(unscale);
  all.clip = input<float>(clip);
  all.skip = input<bool>(skip);
  DF_RUN(adamw16, first, all);
}

std::tuple<Tensor, Tensor> gradient_norm(const std::vector<Tensor>& grads, const std::optional<Tensor>& unscale,
                                         const std::optional<Tensor>& skip) {
  STD_TORCH_CHECK(!grads.empty(), "grads: expected at least one tensor, got none");
  const Tensor& first = grads[0];
  const int64_t n = static_cast<int64_t>(grads.size());
  std::vector<GradientTensor> tensors(n);
  int64_t chunks = 0;
  for (int64_t i = 0; i < n; ++i) {
    check_contiguous(grads[i], "grads", ScalarType::Float, grads[i].sizes(), first);
    tensors[i].n = grads[i].numel();
    tensors[i].grad = input<float>(grads[i]);
    chunks += norm_chunks(tensors[i].n);
  }
  check_option(unscale, "unscale", ScalarType::Float, n, first);
  check_option(skip, "skip", ScalarType::Bool, n, first);
  Tensor norm = torch::stable::new_empty(first, {}, ScalarType::Float);
  Tensor skipped = torch::stable::new_empty(first, {n}, ScalarType::Bool);
  Tensor sums = torch::stable::new_empty(first, {chunks + n}, ScalarType::Double);
  GradientNorm all;
  all.tensors = n;
  all.chunks = chunks;
  all.tensor = tensors.data();
  all.unscale = input<float>(unscale);
  all.skip = input<bool>(skip);
  all.sums = output<double>(sums);
  all.norm = output<float>(norm);
  all.skipped = output<bool>(skipped);
  DF_RUN(gradient_norm, first, all);
  return {norm, skipped};
}

}  // namespace
}  // namespace dalle_fast

DF_REGISTER(m) {
  m.impl("adamw16", TORCH_BOX(&dalle_fast::adamw16));
  m.impl("gradient_norm", TORCH_BOX(&dalle_fast::gradient_norm));
}
