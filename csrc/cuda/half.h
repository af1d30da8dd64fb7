// Names of common/format.h as the CUDA kernels know them.
#pragma once

#include "common/format.h"

namespace dalle_fast {

template <typename T>
using Compute = Arithmetic<T>;

template <typename F>
auto with_element_type(Format format, const F& f) {
  return with_format(format, f);
}

}  // namespace dalle_fast
