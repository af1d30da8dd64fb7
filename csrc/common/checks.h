// Checks of an op's arguments, before any kernel sees an address, and the addresses. The Python functions report bad
// input in more detail; these guard direct calls through torch.ops. Errors read "name: expected X, got Y".
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/format.h"

namespace dalle_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline std::string name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// [2, 3]
inline std::string list_of(Sizes sizes) {
  std::string list = "[";
  for (int64_t size : sizes) list += (list.size() > 1 ? ", " : "") + std::to_string(size);
  return list + "]";
}

// cpu, cuda:1
inline std::string device_of(const Tensor& x) {
  return x.is_cpu() ? "cpu" : x.is_cuda() ? "cuda:" + std::to_string(x.get_device_index()) : "another device";
}

inline void check_dtype(ScalarType dtype, const char* name, std::initializer_list<ScalarType> choices) {
  for (ScalarType choice : choices) {
    if (dtype == choice) return;
  }
  std::string list;
  for (const ScalarType* choice = choices.begin(); choice != choices.end(); ++choice) {
    list += (list.empty() ? "" : choice + 1 == choices.end() ? " or " : ", ") + name_of(*choice);
  }
  STD_TORCH_CHECK(false, name, ": expected ", list, ", got ", name_of(dtype));
}

// x is not empty and has `rank` dimensions, which `sizes` names: "[B, H, N, D]".
inline void check_rank(const Tensor& x, const char* name, int64_t rank, const char* sizes) {
  STD_TORCH_CHECK(x.dim() == rank && x.numel() > 0, name, ": expected a non-empty ", sizes, ", got ",
                  list_of(x.sizes()));
}

// x has this dtype and these sizes, any strides, and is on the device of `like`.
inline void check(const Tensor& x, const char* name, ScalarType dtype, Sizes sizes, const Tensor& like) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.sizes() == sizes && x.device() == like.device(), name, ": expected ",
                  name_of(dtype), " ", list_of(sizes), " on ", device_of(like), ", got ", name_of(x.scalar_type()), " ",
                  list_of(x.sizes()), " on ", device_of(x));
}

// Kernels count this in an int.
inline void check_int(int64_t count, const char* name) {
  STD_TORCH_CHECK(count <= std::numeric_limits<int>::max(), name, ": expected at most ",
                  std::numeric_limits<int>::max(), ", got ", count);
}

inline void check_contiguous(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_contiguous(), name, ": expected contiguous memory, got strides ", list_of(x.strides()));
}

inline void check_contiguous(const Tensor& x, const char* name, ScalarType dtype, Sizes sizes, const Tensor& like) {
  check(x, name, dtype, sizes, like);
  check_contiguous(x, name);
}

// x has this dtype and `numel` contiguous elements, in any shape, and is on the device of `like`.
inline void check_elements(const Tensor& x, const char* name, ScalarType dtype, int64_t numel, const Tensor& like) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.numel() == numel && x.device() == like.device(), name, ": expected ",
                  numel, numel == 1 ? " element" : " elements", " of ", name_of(dtype), " on ", device_of(like),
                  ", got ", x.numel(), " of ", name_of(x.scalar_type()), " on ", device_of(x));
  check_contiguous(x, name);
}

// [first, last) in memory, of all elements of a tensor.
struct Span {
  uintptr_t first, last;
};

inline Span span_of(const Tensor& x) {
  const auto first = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  if (x.numel() == 0) return {first, first};
  int64_t elements = 1;
  for (int64_t d = 0; d < x.dim(); ++d) elements += (x.size(d) - 1) * x.stride(d);
  return {first, first + elements * x.element_size()};
}

// True if no two elements of these sizes and strides can be the same: each dimension steps over all of those inside it.
inline bool is_spread(std::vector<std::pair<int64_t, int64_t>> strides_and_sizes) {
  std::sort(strides_and_sizes.begin(), strides_and_sizes.end());
  int64_t last = 0;  // the last element's place
  for (const auto& [stride, size] : strides_and_sizes) {
    if (size == 1) continue;
    if (stride <= last) return false;
    last += (size - 1) * stride;
  }
  return true;
}

inline std::vector<std::pair<int64_t, int64_t>> strides_and_sizes(const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < x.dim(); ++d) dims.emplace_back(x.stride(d), x.size(d));
  return dims;
}

// Each element of x, which the kernel writes, has its own place in memory.
inline void check_spread(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_contiguous() || x.numel() == 0 || is_spread(strides_and_sizes(x)), name,
                  ": expected elements that do not overlap in memory, got strides ", list_of(x.strides()));
}

// The elements of x, in any order of the dimensions, lie side by side.
inline void check_dense(const Tensor& x, const char* name) {
  if (x.is_contiguous() || x.numel() == 0) return;
  const Span span = span_of(x);
  const bool filled = span.last - span.first == static_cast<uintptr_t>(x.numel() * x.element_size());
  STD_TORCH_CHECK(filled && is_spread(strides_and_sizes(x)), name, ": expected dense memory, got strides ",
                  list_of(x.strides()));
}

// No two of these dense tensors, which the kernel writes, share memory, and none shares it with one that it reads.
inline void check_apart(const std::vector<Tensor>& written, const std::vector<Tensor>& read, const char* names) {
  std::vector<Span> spans;
  const auto before = [](const Span& a, const Span& b) { return a.first < b.first; };
  for (const Tensor& x : written) {
    if (x.numel() > 0) spans.push_back(span_of(x));
  }
  std::sort(spans.begin(), spans.end(), before);
  bool apart = true;
  for (size_t i = 1; i < spans.size(); ++i) apart &= spans[i - 1].last <= spans[i].first;
  for (const Tensor& x : read) {
    if (x.numel() == 0) continue;
    const Span span = span_of(x);
    auto next = std::lower_bound(spans.begin(), spans.end(), span, before);  // the first that begins no earlier
    apart &= next == spans.end() || span.last <= next->first;
    apart &= next == spans.begin() || (next - 1)->last <= span.first;
  }
  STD_TORCH_CHECK(apart, names, ": expected tensors that do not overlap in memory");
}

// The same for two tensors of equal sizes and of any strides, such as the halves of one buffer.
inline void check_apart(const Tensor& a, const Tensor& b, const char* names) {
  const Span x = span_of(a), y = span_of(b);
  bool apart = x.last <= y.first || y.last <= x.first;
  if (!apart && a.strides() == b.strides() && a.element_size() == b.element_size()) {
    const int64_t bytes = x.first < y.first ? y.first - x.first : x.first - y.first;
    auto dims = strides_and_sizes(a);
    dims.emplace_back(bytes / a.element_size(), 2);
    apart = bytes % a.element_size() == 0 && is_spread(std::move(dims));
  }
  STD_TORCH_CHECK(apart, names, ": expected tensors that do not overlap in memory");
}

inline Format format_of(ScalarType dtype, const char* name) {
  check_dtype(dtype, name, {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half});
  return dtype == ScalarType::Float      ? Format::kFloat32
         : dtype == ScalarType::Double   ? Format::kFloat64
         : dtype == ScalarType::BFloat16 ? Format::kBFloat16
                                         : Format::kFloat16;
}

// The dtype of Arithmetic<S> for elements S of x.
inline ScalarType arithmetic_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Address of a tensor that the kernel reads; null where the argument was not given.
template <typename T>
const T* input(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <typename T>
const T* input(const std::optional<Tensor>& x) {
  return x ? input<T>(*x) : nullptr;
}

// Address of a tensor that the kernel writes.
template <typename T>
T* output(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

}  // namespace dalle_fast
