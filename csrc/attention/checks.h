// From the arguments of an attention op to the parameters of its kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "attention/params.h"
#include "common/checks.h"
#include "common/dispatch.h"

namespace dalle_fast {

inline Grid checked_grid(int64_t kind, int64_t text_len, int64_t height, int64_t width, int64_t kernel) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  STD_TORCH_CHECK(kind >= 0 && kind < kMaskKinds, "mask kind: expected 0 to ", kMaskKinds - 1, ", got ", kind);
  STD_TORCH_CHECK(text_len >= 0 && text_len < kMost / 2 && height > 0 && height < kMost && width > 0 && width < kMost &&
                      height * width < kMost / 2 && kernel > 0 && kernel % 2 == 1 && kernel < kMost / (width + 2) / 2,
                  "mask: expected sizes of which an int can count the tokens, and an odd kernel, got text_len ",
                  text_len, ", height ", height, ", width ", width, ", kernel ", kernel);
  return {static_cast<int>(text_len), static_cast<int>(height), static_cast<int>(width), static_cast<int>(kernel)};
}

// The shape of a call, from q [B, H, ..., D].
inline AttentionShape shape_of(const Tensor& q, int64_t kind, const Grid& grid, double scale) {
  const int64_t channels = q.size(q.dim() - 1);
  check_int(q.numel() / channels, "q: rows of all batches and heads");
  check_int(channels, "q: D");
  AttentionShape shape;
  shape.batch = static_cast<int>(q.size(0));
  shape.heads = static_cast<int>(q.size(1));
  shape.channels = static_cast<int>(channels);
  shape.kind = static_cast<MaskKind>(kind);
  shape.grid = grid;
  shape.format = format_of(q.scalar_type(), "q");
  shape.scale = scale;
  return shape;
}

inline View view_of(const Tensor& x) {
  if (x.dim() == 3) return {x.data_ptr(), x.stride(0), x.stride(1), 0, x.stride(2)};
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// x, or a copy of it whose rows the kernel of its device takes: those on tensor cores load 16 bytes at a time.
inline Tensor with_fitting_rows(const Tensor& x, const AttentionShape& shape) {
  if (!on_cuda(x) || !on_tensor_cores(shape) || has_aligned_rows(view_of(x))) return x;
  Tensor copy = torch::stable::new_empty(x, x.sizes());
  return torch::stable::copy_(copy, x);
}

}  // namespace dalle_fast
