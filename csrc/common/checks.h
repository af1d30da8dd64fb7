// Checks of an op's arguments, before any kernel sees an address, and the addresses. The Python functions report bad
// input in more detail; these guard direct calls through torch.ops. Errors read "name: expected X, got Y".
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>

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
