// sparse_attention: checks, outputs, and the choice of a backend.
#include <optional>
#include <tuple>

#include "attention/checks.h"
#include "attention/params.h"
#include "common/checks.h"
#include "common/dispatch.h"

namespace dalle_fast {
namespace {

AttentionShape checked_shape(const Tensor& q, const Tensor& k, const Tensor& v, int64_t kind, const Grid& grid,
                             double scale) {
  check_rank(q, "q", 4, "[B, H, N, D]");
  STD_TORCH_CHECK(q.size(2) == grid.seq_len(), "q: expected N = ", grid.seq_len(), " tokens, got ", q.size(2));
  check(k, "k", q.scalar_type(), q.sizes(), q);
  check(v, "v", q.scalar_type(), q.sizes(), q);
  return shape_of(q, kind, grid, scale);
}

// [B, H, N, D] with the heads of a token side by side in memory, so that merging them copies nothing.
Tensor new_heads(const Tensor& like) {
  Tensor x = torch::stable::new_empty(like, {like.size(0), like.size(2), like.size(1), like.size(3)});
  return torch::stable::transpose(x, 1, 2);
}

std::tuple<Tensor, Tensor> sparse_attention(const Tensor& q, const Tensor& k, const Tensor& v, int64_t kind,
                                            int64_t text_len, int64_t height, int64_t width, int64_t kernel,
                                            double scale) {
  const Grid grid = checked_grid(kind, text_len, height, width, kernel);
  const AttentionShape shape = checked_shape(q, k, v, kind, grid, scale);
  const Tensor fit_q = with_fitting_rows(q, shape), fit_k = with_fitting_rows(k, shape);
  const Tensor fit_v = with_fitting_rows(v, shape);
  Tensor out = new_heads(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, arithmetic_type(q));
  SparseAttentionForward params;
  params.shape = shape;
  params.q = view_of(fit_q);
  params.k = view_of(fit_k);
  params.v = view_of(fit_v);
  params.out = view_of(out);
  params.lse = lse.mutable_data_ptr();
  DF_RUN(sparse_attention_forward, q, params);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> sparse_attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                             const Tensor& v, const Tensor& out, const Tensor& lse,
                                                             int64_t kind, int64_t text_len, int64_t height,
                                                             int64_t width, int64_t kernel, double scale) {
  const Grid grid = checked_grid(kind, text_len, height, width, kernel);
  const AttentionShape shape = checked_shape(q, k, v, kind, grid, scale);
  check(dout, "dout", q.scalar_type(), q.sizes(), q);
  check(out, "out", q.scalar_type(), q.sizes(), q);
  check_contiguous(lse, "lse", arithmetic_type(q), {q.size(0), q.size(1), q.size(2)}, q);
  const Tensor fit_dout = with_fitting_rows(dout, shape), fit_out = with_fitting_rows(out, shape);
  const Tensor fit_q = with_fitting_rows(q, shape), fit_k = with_fitting_rows(k, shape);
  const Tensor fit_v = with_fitting_rows(v, shape);
  Tensor dq = new_heads(q), dk = new_heads(q), dv = new_heads(q);
  SparseAttentionBackward params;
  params.shape = shape;
  params.dout = view_of(fit_dout);
  params.q = view_of(fit_q);
  params.k = view_of(fit_k);
  params.v = view_of(fit_v);
  params.out = view_of(fit_out);
  params.lse = lse.const_data_ptr();
  params.dq = view_of(dq);
  params.dk = view_of(dk);
  params.dv = view_of(dv);
  std::optional<Tensor> delta;
  if (on_cuda(q)) {
    delta = torch::stable::empty_like(lse);
    params.delta = delta->mutable_data_ptr();
  }
  DF_RUN(sparse_attention_backward, q, params);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace dalle_fast

DF_REGISTER(m) {
  m.impl("sparse_attention", TORCH_BOX(&dalle_fast::sparse_attention));
  m.impl("sparse_attention_backward", TORCH_BOX(&dalle_fast::sparse_attention_backward));
}
