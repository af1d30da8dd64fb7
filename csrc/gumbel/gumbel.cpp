// gumbel_softmax, gumbel_quantize and their noise: checks, outputs, and the choice of a backend.
#include "gumbel/gumbel.h"

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/dispatch.h"

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

void check(const Tensor& x, const char* name, ScalarType dtype, int64_t numel, const Tensor& logits) {
  STD_TORCH_CHECK(x.device() == logits.device() && x.scalar_type() == dtype && x.numel() == numel, name, ": expected ",
                  numel, " elements of ", torch::headeronly::toString(dtype), " on ", device_name(logits), ", got ",
                  x.numel(), " of ", torch::headeronly::toString(x.scalar_type()), " on ", device_name(x));
}

template <typename T>
const T* in(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
T* out(Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

GumbelShape checked_shape(const Tensor& logits, const Tensor& seed, double tau) {
  STD_TORCH_CHECK(tau > 0, "tau: expected a positive number, got ", tau);
  check(seed, "seed", ScalarType::Long, 1, logits);
  return {logits.size(0), logits.size(1), logits.size(2) * logits.size(3), in<int64_t>(seed), tau};
}

ScalarType arithmetic_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// kl [B], codes [B, h, w], stats [B, kGumbelStats, h, w].
std::tuple<Tensor, Tensor, Tensor> new_statistics(const Tensor& logits) {
  const int64_t batch = logits.size(0), height = logits.size(2), width = logits.size(3);
  const ScalarType type = arithmetic_type(logits);
  return {torch::stable::new_empty(logits, {batch}, type),
          torch::stable::new_empty(logits, {batch, height, width}, ScalarType::Long),
          torch::stable::new_empty(logits, {batch, kGumbelStats, height, width}, type)};
}

void check_statistics(const Tensor& grad_kl, const Tensor& logits, const Tensor& stats, const GumbelShape& shape) {
  check(grad_kl, "grad_kl", arithmetic_type(logits), shape.batch, logits);
  check(stats, "stats", arithmetic_type(logits), shape.batch * kGumbelStats * shape.pixels, logits);
  STD_TORCH_CHECK(grad_kl.is_contiguous() && stats.is_contiguous(), "grad_kl, stats: expected contiguous memory");
}

int64_t checked_channels(const Tensor& codebook, const Tensor& logits, const GumbelShape& shape) {
  STD_TORCH_CHECK(
      codebook.dim() == 2 && codebook.size(0) == shape.codes && codebook.numel() > 0 && codebook.is_contiguous(),
      "codebook: expected a contiguous [", shape.codes, ", C]");
  check(codebook, "codebook", logits.scalar_type(), codebook.numel(), logits);
  return codebook.size(1);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gumbel_softmax(const Tensor& logits, double tau, const Tensor& seed,
                                                          bool hard) {
  const GridStrides strides = grid_strides(logits, "logits");
  const GumbelShape shape = checked_shape(logits, seed, tau);
  Tensor y = torch::stable::empty_like(logits);
  auto [kl, codes, stats] = new_statistics(logits);
  with_format(format_of(logits.scalar_type(), "logits"), [&, &kl = kl, &codes = codes, &stats = stats](auto zero) {
    using S = decltype(zero);
    using T = Arithmetic<S>;
    const GumbelForward<S> params{
        shape, strides, hard, in<S>(logits), out<S>(y), out<T>(kl), out<int64_t>(codes), out<T>(stats)};
    DF_RUN(gumbel_softmax_forward, logits, params);
  });
  return {y, kl, codes, stats};
}

Tensor gumbel_softmax_backward(const Tensor& grad_y, const Tensor& grad_kl, const Tensor& logits, const Tensor& stats,
                               double tau, const Tensor& seed) {
  const GridStrides strides = grid_strides(logits, "logits"), dy_strides = grid_strides(grad_y, "grad_y");
  const GumbelShape shape = checked_shape(logits, seed, tau);
  check(grad_y, "grad_y", logits.scalar_type(), logits.numel(), logits);
  check_statistics(grad_kl, logits, stats, shape);
  Tensor grad_logits = torch::stable::empty_like(logits);
  with_format(format_of(logits.scalar_type(), "logits"), [&](auto zero) {
    using S = decltype(zero);
    using T = Arithmetic<S>;
    const GumbelBackward<S> params{shape,        strides,       dy_strides,     in<S>(logits),
                                   in<T>(stats), in<S>(grad_y), in<T>(grad_kl), out<S>(grad_logits)};
    DF_RUN(gumbel_softmax_backward, logits, params);
  });
  return grad_logits;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gumbel_quantize(const Tensor& logits, const Tensor& codebook,
                                                                   double tau, const Tensor& seed, bool hard) {
  const GridStrides strides = grid_strides(logits, "logits");
  const GumbelShape shape = checked_shape(logits, seed, tau);
  const int64_t channels = checked_channels(codebook, logits, shape), height = logits.size(2), width = logits.size(3);
  const bool channels_last = strides.pixel != 1;
  Tensor z = channels_last ? torch::stable::new_empty(logits, {shape.batch, height, width, channels})
                           : torch::stable::new_empty(logits, {shape.batch, channels, height, width});
  Tensor soft = torch::stable::new_empty(logits, {shape.batch, shape.pixels, channels}, arithmetic_type(logits));
  auto [kl, codes, stats] = new_statistics(logits);
  with_format(format_of(logits.scalar_type(), "logits"), [&, &kl = kl, &codes = codes, &stats = stats](auto zero) {
    using S = decltype(zero);
    using T = Arithmetic<S>;
    const GridStrides z_strides = channels_last ? GridStrides{1, channels} : GridStrides{shape.pixels, 1};
    const QuantizeForward<S> params{shape,         channels,        strides,   z_strides,  hard,
                                    in<S>(logits), in<S>(codebook), out<S>(z), out<T>(kl), out<int64_t>(codes),
                                    out<T>(stats), out<T>(soft)};
    DF_RUN(gumbel_quantize_forward, logits, params);
  });
  if (channels_last) z = torch::stable::transpose(torch::stable::transpose(z, 1, 3), 2, 3);  // [B, C, h, w]
  return {z, kl, codes, stats, soft};
}

std::tuple<Tensor, Tensor> gumbel_quantize_backward(const Tensor& grad_z, const Tensor& grad_kl, const Tensor& logits,
                                                    const Tensor& codebook, const Tensor& codes, const Tensor& stats,
                                                    const Tensor& soft, double tau, const Tensor& seed, bool hard) {
  const GridStrides strides = grid_strides(logits, "logits"), dz_strides = grid_strides(grad_z, "grad_z");
  const GumbelShape shape = checked_shape(logits, seed, tau);
  const int64_t channels = checked_channels(codebook, logits, shape), positions = shape.batch * shape.pixels;
  check(grad_z, "grad_z", logits.scalar_type(), positions * channels, logits);
  check_statistics(grad_kl, logits, stats, shape);
  check(codes, "codes", ScalarType::Long, positions, logits);
  check(soft, "soft", arithmetic_type(logits), positions * channels, logits);
  STD_TORCH_CHECK(codes.is_contiguous() && soft.is_contiguous(), "codes, soft: expected contiguous memory");
  Tensor grad_logits = torch::stable::empty_like(logits), grad_codebook = torch::stable::empty_like(codebook);
  with_format(format_of(logits.scalar_type(), "logits"), [&](auto zero) {
    using S = decltype(zero);
    using T = Arithmetic<S>;
    QuantizeBackward<S> params{shape,
                               channels,
                               strides,
                               dz_strides,
                               hard,
                               in<S>(logits),
                               in<S>(codebook),
                               in<int64_t>(codes),
                               in<T>(stats),
                               in<T>(soft),
                               in<S>(grad_z),
                               in<T>(grad_kl),
                               out<S>(grad_logits),
                               out<S>(grad_codebook),
                               nullptr};
    Tensor workspace;
#ifdef DALLE_FAST_CUDA
    if (on_cuda(logits)) {
      const int64_t elements = gumbel_quantize_workspace<S>(shape, channels);
      workspace = torch::stable::new_empty(logits, {elements}, arithmetic_type(logits));
      params.workspace = out<T>(workspace);
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
