// decode_attention: checks, output, and the choice of a backend.
#include "attention_checks.h"

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
  STD_TORCH_CHECK(*token >= 0 && *token < grid.image_len(), "position: expected 0 to ", grid.image_len() - 1, ", got ",
                  *token);

  Tensor out = torch::stable::new_empty(q, {candidates, heads, channels});
  const AttentionShape shape{static_cast<int>(candidates),
                             static_cast<int>(heads),
                             static_cast<int>(channels),
                             mask_kind,
                             grid,
                             dtype_of(q),
                             scale};
  decode_attention_cpu({shape, static_cast<int>(prompts), view_of(q), view_of(k), view_of(v), view_of(out),
                        view_of(text_k), view_of(text_v), view_of(cache_k), view_of(cache_v), token});
  return out;
}

}  // namespace
}  // namespace dalle_fast

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) { m.impl("decode_attention", TORCH_BOX(&dalle_fast::decode_attention)); }
