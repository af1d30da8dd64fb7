// decode_attention: checks, output, and the choice of a backend.
#include "attention/checks.h"
#include "attention/params.h"
#include "common/checks.h"
#include "common/dispatch.h"

namespace dalle_fast {
namespace {

Tensor decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& text_k, const Tensor& text_v,
                        const Tensor& cache_k, const Tensor& cache_v, const Tensor& position, int64_t kind,
                        int64_t text_len, int64_t height, int64_t width, int64_t kernel, double scale) {
  const Grid grid = checked_grid(kind, text_len, height, width, kernel);
  check_rank(q, "q", 3, "[C, H, D]");
  const ScalarType dtype = q.scalar_type();
  const int64_t candidates = q.size(0), heads = q.size(1), channels = q.size(2);
  STD_TORCH_CHECK(text_k.dim() == 4 && text_k.size(0) > 0 && candidates % text_k.size(0) == 0,
                  "text_k: expected [P, H, text_len, D] with C = ", candidates, " a multiple of P, got ",
                  list_of(text_k.sizes()));
  const int64_t prompts = text_k.size(0);
  const AttentionShape shape = shape_of(q, kind, grid, scale);
  const int64_t cache_len = with_mask(shape.kind, grid, [](const auto& mask) { return mask.cache_len(); });
  check(k, "k", dtype, q.sizes(), q);
  check(v, "v", dtype, q.sizes(), q);
  check(text_k, "text_k", dtype, {prompts, heads, text_len, channels}, q);
  check(text_v, "text_v", dtype, {prompts, heads, text_len, channels}, q);
  check(cache_k, "cache_k", dtype, {candidates, heads, cache_len, channels}, q);
  check(cache_v, "cache_v", dtype, {candidates, heads, cache_len, channels}, q);
  check_spread(cache_k, "cache_k");
  check_spread(cache_v, "cache_v");
  check_apart(cache_k, cache_v, "cache_k, cache_v");
  check(position, "position", ScalarType::Long, {}, q);
  const auto* token = input<int64_t>(position);
  // On CUDA the host does not wait for it: the kernel answers with NaN.
  STD_TORCH_CHECK(on_cuda(q) || is_inside(*token, grid), "position: expected 0 to ", grid.image_len() - 1, ", got ",
                  *token);

  const Tensor fit_q = with_fitting_rows(q, shape), fit_k = with_fitting_rows(k, shape);
  const Tensor fit_v = with_fitting_rows(v, shape);
  const Tensor fit_text_k = with_fitting_rows(text_k, shape), fit_text_v = with_fitting_rows(text_v, shape);
  Tensor out = torch::stable::new_empty(q, q.sizes());
  DecodeAttention params;
  params.shape = shape;
  params.prompts = static_cast<int>(prompts);
  params.q = view_of(fit_q);
  params.k = view_of(fit_k);
  params.v = view_of(fit_v);
  params.out = view_of(out);
  params.text_k = view_of(fit_text_k);
  params.text_v = view_of(fit_text_v);
  params.cache_k = view_of(cache_k);
  params.cache_v = view_of(cache_v);
  params.position = token;
  DF_RUN(decode_attention, q, params);
  return out;
}

}  // namespace
}  // namespace dalle_fast

DF_REGISTER(m) { m.impl("decode_attention", TORCH_BOX(&dalle_fast::decode_attention)); }
