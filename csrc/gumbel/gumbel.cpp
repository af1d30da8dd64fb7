// gumbel_softmax, gumbel_quantize and their noise: checks, outputs, and the choice of a backend.
#include "gumbel/gumbel.h"

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "common/checks.h"
#include "common/dispatch.h"
#include "common/format.h"

namespace dalle_fast {
namespace {

// Strides of size-1 dimensions carry no meaning and are not compared.
bool has_strides(const Tensor& x, const int64_t (&strides)[4]) {
  for (int d = 0; d < 4; ++d) {
    if (x.size(d) != 1 && x.stride(d) != strides[d]) return false;
  }
  return true;
}

// Of x [B, K, h, w].
GridStrides checked_strides(const Tensor& x, const char* name) {
  const int64_t codes = x.size(1), width = x.size(3), pixels = x.size(2) * width;
  if (has_strides(x, {codes * pixels, pixels, width, 1})) return {pixels, 1};
  STD_TORCH_CHECK(has_strides(x, {codes * pixels, 1, width * codes, codes}), name,
                  ": expected contiguous or channels_last memory, got strides ", list_of(x.strides()));
  return {1, codes};
}

GumbelShape checked_shape(const Tensor& logits, const Tensor& seed, double tau) {
  check_rank(logits, "logits", 4, "[B, K, h, w]");
  check_int(logits.size(1), "logits: K");
  STD_TORCH_CHECK(tau > 0, "tau: expected a positive number, got ", tau);
  check_elements(seed, "seed", ScalarType::Long, 1, logits);
  GumbelShape shape;
  shape.batch = logits.size(0);
  shape.codes = logits.size(1);
  shape.pixels = logits.size(2) * logits.size(3);
  shape.seed = input<int64_t>(seed);
  shape.tau = tau;
  return shape;
}

// kl [B], codes [B, h, w], stats [B, kGumbelStats, h, w].
std::tuple<Tensor, Tensor, Tensor> new_statistics(const Tensor& logits) {
  const int64_t batch = logits.size(0), height = logits.size(2), width = logits.size(3);
  const ScalarType type = arithmetic_type(logits);
  return {torch::stable::new_empty(logits, {batch}, type),
          torch::stable::new_empty(logits, {batch, height, width}, ScalarType::Long),
          torch::stable::new_empty(logits, {batch, kGumbelStats, height, width}, type)};
}

void check_statistics(const Tensor& grad_kl, const Tensor& logits, const Tensor& stats) {
  const int64_t batch = logits.size(0), height = logits.size(2), width = logits.size(3);
  const ScalarType type = arithmetic_type(logits);
  check_contiguous(grad_kl, "grad_kl", type, {batch}, logits);
  check_contiguous(stats, "stats", type, {batch, kGumbelStats, height, width}, logits);
}

int64_t checked_channels(const Tensor& codebook, const Tensor& logits) {
  check_rank(codebook, "codebook", 2, "[K, C]");
  check_contiguous(codebook, "codebook", logits.scalar_type(), {logits.size(1), codebook.size(1)}, logits);
  return codebook.size(1);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gumbel_softmax(const Tensor& logits, double tau, const Tensor& seed,
                                                          bool hard) {
  const GumbelShape shape = checked_shape(logits, seed, tau);
  const GridStrides strides = checked_strides(logits, "logits");
  Tensor y = torch::stable::empty_like(logits);
  auto [kl, codes, stats] = new_statistics(logits);
  with_format(format_of(logits.scalar_type(), "logits"), [&, &kl = kl, &codes = codes, &stats = stats](auto element) {
    using S = decltype(element);
    using T = Arithmetic<S>;
    GumbelForward<S> params;
    params.shape = shape;
    params.strides = strides;
    params.hard = hard;
    params.logits = input<S>(logits);
    params.y = output<S>(y);
    params.kl = output<T>(kl);
    params.codes = output<int64_t>(codes);
    params.stats = output<T>(stats);
    DF_RUN(gumbel_softmax_forward, logits, params);
  });
  return {y, kl, codes, stats};
}

Tensor gumbel_softmax_backward(const Tensor& grad_y, const Tensor& grad_kl, const Tensor& logits, const Tensor& stats,
                               double tau, const Tensor& seed) {
  const GumbelShape shape = checked_shape(logits, seed, tau);
  const GridStrides strides = checked_strides(logits, "logits");
  check(grad_y, "grad_y", logits.scalar_type(), logits.sizes(), logits);
  const GridStrides dy_strides = checked_strides(grad_y, "grad_y");
  check_statistics(grad_kl, logits, stats);
  Tensor grad_logits = torch::stable::empty_like(logits);
  with_format(format_of(logits.scalar_type(), "logits"), [&](auto element) {
    using S = decltype(element);
    using T = Arithmetic<S>;
    GumbelBackward<S> params;
    params.shape = shape;
    params.strides = strides;
    params.dy_strides = dy_strides;
    params.logits = input<S>(logits);
    params.stats = input<T>(stats);
    params.grad_y = input<S>(grad_y);
    params.grad_kl = input<T>(grad_kl);
    params.grad_logits = output<S>(grad_logits);
    DF_RUN(gumbel_softmax_backward, logits, params);
  });
  return grad_logits;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gumbel_quantize(const Tensor& logits, const Tensor& codebook,
                                                                   double tau, const Tensor& seed, bool hard) {
  const GumbelShape shape = checked_shape(logits, seed, tau);
  const GridStrides strides = checked_strides(logits, "logits");
  const int64_t channels = checked_channels(codebook, logits), height = logits.size(2), width = logits.size(3);
  const bool channels_last = strides.pixel != 1;
  Tensor z = channels_last ? torch::stable::new_empty(logits, {shape.batch, height, width, channels})
                           : torch::stable::new_empty(logits, {shape.batch, channels, height, width});
  Tensor soft = torch::stable::new_empty(logits, {shape.batch, shape.pixels, channels}, arithmetic_type(logits));
  auto [kl, codes, stats] = new_statistics(logits);
  with_format(format_of(logits.scalar_type(), "logits"), [&, &kl = kl, &codes = codes, &stats = stats](auto element) {
    using S = decltype(element);
    using T = Arithmetic<S>;
    QuantizeForward<S> params;
    params.shape = shape;
    params.channels = channels;
    params.strides = strides;
    params.z_strides = channels_last ? GridStrides{1, channels} : GridStrides{shape.pixels, 1};
    params.hard = hard;
    params.logits = input<S>(logits);
    params.codebook = input<S>(codebook);
    params.z = output<S>(z);
    params.kl = output<T>(kl);
    params.codes = output<int64_t>(codes);
    params.stats = output<T>(stats);
    params.soft = output<T>(soft);
    DF_RUN(gumbel_quantize_forward, logits, params);
  });
  if (channels_last) z = torch::stable::transpose(torch::stable::transpose(z, 1, 3), 2, 3);  // [B, C, h, w]
  return {z, kl, codes, stats, soft};
}

std::tuple<Tensor, Tensor> gumbel_quantize_backward(const Tensor& grad_z, const Tensor& grad_kl, const Tensor& logits,
                                                    const Tensor& codebook, const Tensor& codes, const Tensor& stats,
                                                    const Tensor& soft, double tau, const Tensor& seed, bool hard) {
  const GumbelShape shape = checked_shape(logits, seed, tau);
  const GridStrides strides = checked_strides(logits, "logits");
  const int64_t channels = checked_channels(codebook, logits), height = logits.size(2), width = logits.size(3);
  check(grad_z, "grad_z", logits.scalar_type(), {shape.batch, channels, height, width}, logits);
  const GridStrides dz_strides = checked_strides(grad_z, "grad_z");
  check_statistics(grad_kl, logits, stats);
  check_contiguous(codes, "codes", ScalarType::Long, {shape.batch, height, width}, logits);
  check_contiguous(soft, "soft", arithmetic_type(logits), {shape.batch, shape.pixels, channels}, logits);
  Tensor grad_logits = torch::stable::empty_like(logits), grad_codebook = torch::stable::empty_like(codebook);
  with_format(format_of(logits.scalar_type(), "logits"), [&](auto element) {
    using S = decltype(element);
    using T = Arithmetic<S>;
    QuantizeBackward<S> params;
    params.shape = shape;
    params.channels = channels;
    params.strides = strides;
    params.dz_strides = dz_strides;
    params.hard = hard;
    params.logits = input<S>(logits);
    params.codebook = input<S>(codebook);
    params.codes = input<int64_t>(codes);
    params.stats = input<T>(stats);
    params.soft = input<T>(soft);
    params.grad_z = input<S>(grad_z);
    params.grad_kl = input<T>(grad_kl);
    params.grad_logits = output<S>(grad_logits);
    params.grad_codebook = output<S>(grad_codebook);
#ifdef DALLE_FAST_CUDA
    std::optional<Tensor> workspace;
    if (on_cuda(logits)) {
      const int64_t elements = gumbel_quantize_workspace<S>(shape, channels);
      workspace = torch::stable::new_empty(logits, {elements}, arithmetic_type(logits));
      params.workspace = output<T>(*workspace);
    }
#endif
    DF_RUN(gumbel_quantize_backward, logits, params);
  });
  return {grad_logits, grad_codebook};
}

}  // namespace
}  // namespace dalle_fast

DF_REGISTER(m) {
  m.impl("gumbel_softmax", TORCH_BOX(&dalle_fast::gumbel_softmax));
  m.impl("gumbel_softmax_backward", TORCH_BOX(&dalle_fast::gumbel_softmax_backward));
  m.impl("gumbel_quantize", TORCH_BOX(&dalle_fast::gumbel_quantize));
  m.impl("gumbel_quantize_backward", TORCH_BOX(&dalle_fast::gumbel_quantize_backward));
}
