// Formats of tensor elements, for kernels that choose at run time.
#pragma once

namespace dalle_fast {

enum class Format { kFloat32, kFloat64, kBFloat16, kFloat16 };

}  // namespace dalle_fast
