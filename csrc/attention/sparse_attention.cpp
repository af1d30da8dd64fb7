// sparse_attention: checks, outputs, and the choice of a backend.
#include <tuple>

#include "attention/checks.h"
#include "common/dispatch.h"

namespace dalle_fast {
namespace {

AttentionShape checked_shape(const Tensor& q, const Tensor& k, const Tensor& v, int64_t kind, const Grid& grid,
                             double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && q.numel() > 0, "q: expected a non-empty [B, H, N, D]");
  STD_TORCH_CHECK(q.size(2) == grid.seq_len(), "q: expected N = ", grid.seq_len(), " tokens, got ", q.size(2));
  check_like(k, "k", q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  check_like(v, "v", q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  return {static_cast<int>(q.size(0)),
          static_cast<int>(q.size(1)),
          static_cast<int>(q.size(3)),
          static_cast<MaskKind>(kind),
          grid,
          format_of(q.scalar_type(), "dtype"),
          scale};
}

// [B, H, N, D] with the heads of a token side by side in memory, so that merging them copies nothing.
Tensor new_heads(const Tensor& like) {
  Tensor x = torch::stable::new_empty(like, {like.size(0), like.size(2), like.size(1), like.size(3)});
  return torch::stable::transpose(with_huge_pages(x), 1, 2);
}

std::tuple<Tensor, Tensor> sparse_attention(const Tensor& q, const Tensor& k, const Tensor& v, int64_t kind,
                                            int64_t text_len, int64_t height, int64_t width, int64_t kernel,
                                            double scale) {
  const Grid grid = checked_grid(kind, text_len, height, width, kernel);
  const AttentionShape shape = checked_shape(q, k, v, kind, grid, scale);
  Tensor out = new_heads(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, accumulate_type(q));
  const Tensor fit_q = with_fitting_rows(q, shape), fit_k = with_fitting_rows(k, shape);
  const Tensor fit_v = with_fitting_rows(v, shape);
  const SparseAttentionForward params{shape,          view_of(fit_q), view_of(fit_k),
                                      view_of(fit_v), view_of(out),   lse.mutable_data_ptr()};
  DF_RUN(sparse_attention_forward, q, params);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> sparse_attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                             const Tensor& v, const Tensor& out, const Tensor& lse,
                                                             int64_t kind, int64_t text_len, int64_t height,
                                                             int64_t width, int64_t kernel, double scale) {
  const Grid grid = checked_grid(kind, text_len, height, width, kernel);
  const AttentionShape shape = checked_shape(q, k, v, kind, grid, scale);
  check_like(dout, "dout", q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  check_like(out, "out", q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  STD_TORCH_CHECK(lse.scalar_type() == accumulate_type(q) && lse.numel() * q.size(3) == q.numel() &&
                      lse.is_contiguous() && lse.device() == q.device(),
                  "lse: expected what the forward returned");
  Tensor dq = new_heads(q), dk = new_heads(q), dv = new_heads(q);
  const Tensor fit_dout = with_fitting_rows(dout, shape), fit_out = with_fitting_rows(out, shape);
  const Tensor fit_q = with_fitting_rows(q, shape), fit_k = with_fitting_rows(k, shape);
  const Tensor fit_v = with_fitting_rows(v, shape);
  SparseAttentionBackward params{shape,          view_of(fit_dout), view_of(fit_q),       view_of(fit_k),
                                 view_of(fit_v), view_of(fit_out),  lse.const_data_ptr(), view_of(dq),
                                 view_of(dk),    view_of(dv)};
  const Tensor delta = on_cuda(q) ? torch::stable::empty_like(lse) : lse;
  params.delta = delta.data_ptr();
  DF_RUN(sparse_attention_backward, q, params);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace dalle_fast

DF_REGISTER(m) {
  m.impl("sparse_attention", TORCH_BOX(&dalle_fast::sparse_attention));
  m.impl("sparse_attention_backward", TORCH_BOX(&dalle_fast::sparse_attention_backward));
}
