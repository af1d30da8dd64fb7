// Separable: rows are averaged first, because that runs along contiguous memory and vectorises, then the one row of
// sums that an output row needs is averaged across.
#include "host/area_resize.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace dalle_fast {
namespace {

// Added and subtracted again, it rounds a small float to the nearest integer, ties to even, without a call.
constexpr float kToInteger = 0x1.8p23f;

// The input pixels that one output pixel averages, along one axis.
struct Window {
  int64_t first;
  std::vector<float> weights;  // sums to 1
};

std::vector<Window> windows(int64_t size, int64_t out_size) {
  const double scale = static_cast<double>(size) / static_cast<double>(out_size);
  const double half = std::max(scale, 1.0) / 2;
  std::vector<Window> result(out_size);
  for (int64_t i = 0; i < out_size; ++i) {
    const double centre = (static_cast<double>(i) + 0.5) * scale;
    const double begin = std::max(centre - half, 0.0);
    const double end = std::min(centre + half, static_cast<double>(size));
    const int64_t first = std::min(static_cast<int64_t>(begin), size - 1);
    const int64_t last = std::clamp(static_cast<int64_t>(std::ceil(end)) - 1, first, size - 1);
    result[i].first = first;
    for (int64_t j = first; j <= last; ++j) {
      const double overlap = std::min(end, static_cast<double>(j + 1)) - std::max(begin, static_cast<double>(j));
      result[i].weights.push_back(static_cast<float>(std::max(overlap, 0.0) / (end - begin)));
    }
  }
  return result;
}

}  // namespace

void area_resize(const uint8_t* image, int64_t height, int64_t width, int64_t channels, uint8_t* out,
                 int64_t out_height, int64_t out_width) {
  const std::vector<Window> rows = windows(height, out_height);
  const std::vector<Window> columns = windows(width, out_width);
  const int64_t stride = width * channels;
  std::vector<float> sums(stride);
  for (const Window& row : rows) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (size_t k = 0; k < row.weights.size(); ++k) {
      const uint8_t* source = image + (row.first + static_cast<int64_t>(k)) * stride;
      const float weight = row.weights[k];
      for (int64_t x = 0; x < stride; ++x) sums[x] += weight * static_cast<float>(source[x]);
    }
    for (const Window& column : columns) {
      for (int64_t c = 0; c < channels; ++c) {
        const float* source = sums.data() + column.first * channels + c;
        float sum = 0;
        for (size_t k = 0; k < column.weights.size(); ++k) sum += column.weights[k] * source[k * channels];
        *out++ = static_cast<uint8_t>(std::clamp(sum + kToInteger - kToInteger, 0.0f, 255.0f));
      }
    }
  }
}

}  // namespace dalle_fast
