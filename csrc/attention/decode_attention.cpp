// decode_attention: checks, output, and the choice of a backend.
#include "attention/checks.h"
#include "common/dispatch.h"

namespace dalle_fast {
namespace {

Tensor decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& text_k, const Tensor& text_v,
                        const Tensor& cache_k, const Tensor& cache_v, const Tensor& position, int64_t kind,
                        int64_t text_len, int64_t height, int64_t width, int64_t kernel, double scale) {
  const Grid grid = checked_grid(kind, text_len, height, width, kernel);
  STD_TORCH_CHECK(q.dim() == 3 && q.numel() > 0, "q: expected a non-empty [C, H, D]");
  STD_TORCH_CHECK(text_k.dim() == 4 && text_k.size(0) > 0 && q.size(0) % text_k.size(0) == 0,
                  "text_k: expected [P, H, text_len, D] with C a multiple of P");
  const int64_t candidates = q.size(0), heads = q.size(1), channels = q.size(2), prompts = text_k.size(0);
  const auto mask_kind = static_cast<MaskKind>(kind);
  const int64_t cache_len = with_mask(mask_kind, grid, [](const auto& mask) { return mask.cache_len(); });
  check_like(k, "k", q, {candidates, heads, channels});
  check_like(v, "v", q, {candidates, heads, channels});
  check_like(text_k, "text_k", q, {prompts, heads, text_len, channels});
  check_like(text_v, "text_v", q, {prompts, heads, text_len, channels});
  check_like(cache_k, "cache_k", q, {candidates, heads, cache_len, channels});
  check_like(cache_v, "cache_v", q, {candidates, heads, cache_len, channels});
  STD_TORCH_CHECK(position.scalar_type() == ScalarType::Long && position.dim() == 0 && position.device() == q.device(),
                  "position: expected one int64 on the device of q");
  const auto* token = static_cast<const int64_t*>(position.const_data_ptr());
  // On CUDA the host does not wait for it: the kernel answers with NaN.
  STD_TORCH_CHECK(on_cuda(q) || is_inside(*token, grid), "position: expected 0 to ", grid.image_len() - 1, ", got ",
                  *token);

  Tensor out = torch::stable::new_empty(q, {candidates, heads, channels});
  const AttentionShape shape{static_cast<int>(candidates),
                             static_cast<int>(heads),
                             static_cast<int>(channels),
                             mask_kind,
                             grid,
                             format_of(q.scalar_type(), "dtype"),
                             scale};
  const Tensor fit_q = with_fitting_rows(q, shape), fit_k = with_fitting_rows(k, shape);
  const Tensor fit_v = with_fitting_rows(v, shape);
  const Tensor fit_text_k = with_fitting_rows(text_k, shape), fit_text_v = with_fitting_rows(text_v, shape);
  const DecodeAttention params{
      shape,        static_cast<int>(prompts), view_of(fit_q),      view_of(fit_k),   view_of(fit_v),
      view_of(out), view_of(fit_text_k),       view_of(fit_text_v), view_of(cache_k), view_of(cache_v),
      token};
  DF_RUN(decode_attention, q, params);
  return out;
}

}  // namespace
}  // namespace dalle_fast

DF_REGISTER(m) { m.impl("decode_attention", TORCH_BOX(&dalle_fast::decode_attention)); }
