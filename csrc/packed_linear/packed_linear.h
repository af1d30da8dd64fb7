// Linear layers on a few rows, with packed weights: parameters of the kernels, without torch.
//
// Weights [out, in] are packed into panels of kPanelOutputs outputs, and a panel into lines of one cache line each:
// kPanelOutputs outputs of float32, two consecutive inputs of kPanelOutputs outputs of bfloat16, or four of int8. The
// ends of the last panel and of the last lines are zeros.
#pragma once

#include <cstdint>

namespace dalle_fast {

enum class WeightFormat { kFloat32, kBFloat16, kInt8 };

constexpr int64_t kPanelOutputs = 16;
constexpr int64_t kLineBytes = 64;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Inputs of one line.
constexpr int64_t line_depth(WeightFormat format) {
  return format == WeightFormat::kFloat32 ? 1 : format == WeightFormat::kBFloat16 ? 2 : 4;
}

struct PackLinear {
  int64_t in_features, out_features;
  const float* weight;  // [out, in]
  WeightFormat format;
  void* panels;   // [panels, lines, kLineBytes] bytes
  float* scales;  // [out], int8 only: weight = scale * stored
};

struct PackedLinear {
  int64_t rows, in_features, out_features;
  const float* x;  // [rows, in]
  WeightFormat format;
  const void* panels;
  const float* scales;  // [out], int8 only
  const float* bias;    // [out] or null
  float* out;           // [rows, out]
};

void pack_linear_cpu(const PackLinear& params);
void packed_linear_cpu(const PackedLinear& params);

}  // namespace dalle_fast
