// Area resize of 8-bit images, as in the paper's preprocessing listings (appendix A.2, B.2).
#pragma once

#include <cstdint>

namespace dalle_fast {

// image [height, width, channels] -> out [out_height, out_width, channels], both contiguous.
//
// An output pixel is the average of the input under a window centred on it, `height / out_height` input pixels tall but
// at least one (the same across). Shrinking, that is the true area average at any factor; enlarging, a window of one
// pixel averages its two neighbours by their share of it, which is linear interpolation.
void area_resize(const uint8_t* image, int64_t height, int64_t width, int64_t channels, uint8_t* out,
                 int64_t out_height, int64_t out_width);

}  // namespace dalle_fast
