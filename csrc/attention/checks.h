// What the attention ops check before any kernel sees an address. The Python functions report bad input in more detail;
// this guards direct calls through torch.ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <limits>

#include "attention/params.h"
#include "common/dispatch.h"

namespace dalle_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Grid checked_grid(int64_t kind, int64_t text_len, int64_t height, int64_t width, int64_t kernel) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  STD_TORCH_CHECK(kind >= 0 && kind < kMaskKinds, "mask kind: expected 0 to ", kMaskKinds - 1, ", got ", kind);
  STD_TORCH_CHECK(text_len >= 0 && text_len < kMost / 2 && height > 0 && height < kMost && width > 0 && width < kMost &&
                      height * width < kMost / 2 && kernel > 0 && kernel % 2 == 1 && kernel < kMost / (width + 2) / 2,
                  "mask: impossible sizes text_len ", text_len, ", height ", height, ", width ", width, ", kernel ",
                  kernel);
  return {static_cast<int>(text_len), static_cast<int>(height), static_cast<int>(width), static_cast<int>(kernel)};
}

// x must have these sizes, and the dtype and device of `like`.
inline void check_like(const Tensor& x, const char* name, const Tensor& like, std::initializer_list<int64_t> sizes) {
  bool same = x.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t d = 0; same && d < x.dim(); ++d) same = x.size(d) == sizes.begin()[d];
  STD_TORCH_CHECK(same, name, ": its shape does not fit q and the mask");
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type() && x.device() == like.device(), name,
                  ": expected the dtype and device of q");
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
