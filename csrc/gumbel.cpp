// gumbel_softmax and its noise: checks, outputs, and the choice of a backend.
#include "gumbel.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "cpu/noise.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Strides of size-1 dimensions carry no meaning and are not compared.
bool has_strides(const Tensor& x, const int64_t (&strides)[4]) {
  for (int d = 0; d < 4; ++d) {
    if (x.size(d) != 1 && x.stride(d) != strides[d]) return false;
  }
  return true;
}

GridStrides grid_strides(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, name, ": expected a non-empty [B, K, h, w], got ", x.dim(),
                  " dimensions and ", x.numel(), " elements");
  const int64_t codes = x.size(1), width = x.size(3), pixels = x.size(2) * width;
  if (has_strides(x, {codes * pixels, pixels, width, 1})) return {pixels, 1};
  STD_TORCH_CHECK(has_strides(x, {codes * pixels, 1, width * codes, codes}), name,
                  ": expected contiguous or channels_last memory");
  return {1, codes};
}

void check(const Tensor& x, const char* name, ScalarType dtype, int64_t numel) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == dtype && x.numel() == numel, name, ": expected ", numel,
                  " elements of ", torch::headeronly::toString(dtype), " on the CPU, got ", x.numel(), " of ",
                  torch::headeronly::toString(x.scalar_type()));
}

uint64_t seed_value(const Tensor& seed) {
  check(seed, "seed", ScalarType::Long, 1);
  return static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
}

GumbelShape checked_shape(const Tensor& logits, const Tensor& seed, double tau) {
  STD_TORCH_CHECK(tau > 0, "tau: expected a positive number, got ", tau);
  return {logits.size(0), logits.size(1), logits.size(2) * logits.size(3), seed_value(seed), tau};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits, double tau, const Tensor& seed, bool hard) {
  const GridStrides strides = grid_strides(logits, "logits");
  const GumbelShape shape = checked_shape(logits, seed, tau);
  const int64_t batch = shape.batch, height = logits.size(2), width = logits.size(3);
  Tensor y = torch::stable::empty_like(logits);
  Tensor kl = torch::stable::new_empty(logits, {batch});
  Tensor codes = torch::stable::new_empty(logits, {batch, height, width}, ScalarType::Long);
  Tensor stats = torch::stable::new_empty(logits, {batch, kGumbelStats, height, width});
  gumbel_softmax_forward_cpu(
      GumbelForward<T>{shape, strides, hard, static_cast<const T*>(logits.const_data_ptr()),
                       static_cast<T*>(y.mutable_data_ptr()), static_cast<T*>(kl.mutable_data_ptr()),
                       static_cast<int64_t*>(codes.mutable_data_ptr()), static_cast<T*>(stats.mutable_data_ptr())});
  return {y, kl, codes, stats};
}

template <typename T>
Tensor backward(const Tensor& grad_y, const Tensor& grad_kl, const Tensor& logits, const Tensor& stats, double tau,
                const Tensor& seed) {
  const GridStrides strides = grid_strides(logits, "logits"), dy_strides = grid_strides(grad_y, "grad_y");
  const GumbelShape shape = checked_shape(logits, seed, tau);
  const ScalarType dtype = logits.scalar_type();
  check(grad_y, "grad_y", dtype, logits.numel());
  check(grad_kl, "grad_kl", dtype, shape.batch);
  check(stats, "stats", dtype, shape.batch * kGumbelStats * shape.pixels);
  STD_TORCH_CHECK(grad_kl.is_contiguous() && stats.is_contiguous(), "grad_kl, stats: expected contiguous memory");
  Tensor grad_logits = torch::stable::empty_like(logits);
  gumbel_softmax_backward_cpu(GumbelBackward<T>{
      shape, strides, dy_strides, static_cast<const T*>(logits.const_data_ptr()),
      static_cast<const T*>(stats.const_data_ptr()), static_cast<const T*>(grad_y.const_data_ptr()),
      static_cast<const T*>(grad_kl.const_data_ptr()), static_cast<T*>(grad_logits.mutable_data_ptr())});
  return grad_logits;
}

bool is_double(const Tensor& logits) {
  const ScalarType dtype = logits.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "logits: expected float32 or float64, got ", torch::headeronly::toString(dtype));
  return dtype == ScalarType::Double;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gumbel_softmax(const Tensor& logits, double tau, const Tensor& seed,
                                                          bool hard) {
  return is_double(logits) ? forward<double>(logits, tau, seed, hard) : forward<float>(logits, tau, seed, hard);
}

Tensor gumbel_softmax_backward(const Tensor& grad_y, const Tensor& grad_kl, const Tensor& logits, const Tensor& stats,
                               double tau, const Tensor& seed) {
  return is_double(logits) ? backward<double>(grad_y, grad_kl, logits, stats, tau, seed)
                           : backward<float>(grad_y, grad_kl, logits, stats, tau, seed);
}

Tensor philox_uniform(const Tensor& seed, int64_t first, int64_t n) {
  STD_TORCH_CHECK(first >= 0 && n >= 0, "first, n: expected at least 0, got ", first, ", ", n);
  Tensor out = torch::stable::new_empty(seed, {n}, ScalarType::Float);
  uniform_cpu(seed_value(seed), first, n, static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace
}  // namespace dalle_fast

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) {
  m.impl("gumbel_softmax", TORCH_BOX(&dalle_fast::gumbel_softmax));
  m.impl("gumbel_softmax_backward", TORCH_BOX(&dalle_fast::gumbel_softmax_backward));
  m.impl("philox_uniform", TORCH_BOX(&dalle_fast::philox_uniform));
}
