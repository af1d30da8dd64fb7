// With few rows a linear layer is bound by reading its weights: each panel comes from memory once, in order, and meets
// all rows while it is in the cache. Threads split the panels. A tile of rows and outputs stays in registers over the
// whole sum, which runs over the inputs in order: a row's result depends neither on the other rows nor on the threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common/format.h"
#include "cpu/simd.h"
#include "packed_linear/packed_linear.h"

namespace dalle_fast {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kGrain = 65536;  // weights worth a thread
constexpr int kMaxRows = 6;        // of a tile
constexpr int kMaxPanels = 8;
constexpr int64_t kFewestGroupsToUnpack = 3;

// The product of a fixed number of rows with several panels, and with one.
struct Tile {
  using Run = void (*)(const float* x, int64_t in, const char* panels, int64_t panel_bytes, const char* next,
                       int64_t next_step, float* sums);
  int panels;
  Run several, single;
};

// The kernels of an instruction set.
struct Kernels {
  const Tile* tiles[3];                                               // by format; then by rows, from 1
  void (*unpack_int8)(const char* panel, int64_t lines, char* wide);  // a panel of int8 as one of float32
};

#define DF_EACH_SIMD "packed_linear/cpu_tile.h"
#include "cpu/each_simd.h"

int64_t lines_of(int64_t in_features, WeightFormat format) { return divide_up(in_features, line_depth(format)); }

// out = sums * scales + bias; sums [rows, columns] with a row stride of sums_row.
void store(const PackedLinear& p, const float* sums, int64_t sums_row, int64_t row, int64_t rows, int64_t column) {
  const int64_t columns = std::min(sums_row, p.out_features - column);
  for (int64_t r = 0; r < rows; ++r) {
    float* out = p.out + (row + r) * p.out_features + column;
    const float* sum = sums + r * sums_row;
    for (int64_t j = 0; j < columns; ++j) {
      const float scaled = p.format == WeightFormat::kInt8 ? sum[j] * p.scales[column + j] : sum[j];
      out[j] = p.bias == nullptr ? scaled : scaled + p.bias[column + j];
    }
  }
}

void multiply_panels(const PackedLinear& p, int64_t begin, int64_t end) {
  const Kernels& kernels = DF_BEST(kKernels);
  const int64_t panel_bytes = lines_of(p.in_features, p.format) * kLineBytes;
  const int64_t groups = divide_up(p.rows, kMaxRows);  // of rows, of nearly equal size
  const bool unpack = p.format == WeightFormat::kInt8 && groups >= kFewestGroupsToUnpack;
  const WeightFormat format = unpack ? WeightFormat::kFloat32 : p.format;
  const Tile* tiles = kernels.tiles[static_cast<int>(format)];
  const int64_t tile_bytes = lines_of(p.in_features, format) * kLineBytes;
  const int64_t step = tiles[divide_up(p.rows, groups) - 1].panels;
  const int64_t wide_bytes = unpack ? lines_of(p.in_features, p.format) * line_depth(p.format) * kLineBytes : 0;
  std::vector<char> wide(step * wide_bytes);
  alignas(kLineBytes) float sums[kMaxRows * kMaxPanels * kPanelOutputs];
  for (int64_t panel = begin; panel < end; panel += step) {
    const int64_t count = std::min(step, end - panel);
    const char* panels = static_cast<const char*>(p.panels) + panel * panel_bytes;
    // The next panels, a share of them with each group of rows.
    const char* next = panels + (panel + 2 * step <= end ? step * panel_bytes : 0);
    const int64_t next_step = panel_bytes * kLineBytes / (tile_bytes * groups);
    if (unpack) {
      for (int64_t i = 0; i < count; ++i) {
        kernels.unpack_int8(panels + i * panel_bytes, panel_bytes / kLineBytes, wide.data() + i * wide_bytes);
      }
      panels = wide.data();
    }
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t row = p.rows * group / groups, rows = p.rows * (group + 1) / groups - row;
      const Tile& tile = tiles[rows - 1];
      const float* x = p.x + row * p.in_features;
      const char* share = next + count * panel_bytes * group / groups;
      const int64_t stride = unpack ? wide_bytes : panel_bytes;
      if (count == tile.panels) {
        tile.several(x, p.in_features, panels, stride, share, next_step, sums);
        store(p, sums, count * kPanelOutputs, row, rows, panel * kPanelOutputs);
      } else {
        for (int64_t i = 0; i < count; ++i) {
          tile.single(x, p.in_features, panels + i * stride, stride, share, next_step, sums);
          store(p, sums, kPanelOutputs, row, rows, (panel + i) * kPanelOutputs);
        }
      }
    }
  }
}

void pack_panel(const PackLinear& p, int64_t panel) {
  const int64_t depth = line_depth(p.format), bytes = lines_of(p.in_features, p.format) * kLineBytes;
  char* data = static_cast<char*>(p.panels) + panel * bytes;
  std::fill_n(data, bytes, 0);
  for (int64_t j = 0; j < std::min(kPanelOutputs, p.out_features - panel * kPanelOutputs); ++j) {
    const float* row = p.weight + (panel * kPanelOutputs + j) * p.in_features;
    float scale = 0;
    if (p.format == WeightFormat::kInt8) {
      for (int64_t d = 0; d < p.in_features; ++d) scale = std::max(scale, std::fabs(row[d]));
      scale /= 127;
      p.scales[panel * kPanelOutputs + j] = scale;
    }
    for (int64_t d = 0; d < p.in_features; ++d) {
      const int64_t i = (d / depth * kPanelOutputs + j) * depth + d % depth;
      if (p.format == WeightFormat::kFloat32) {
        reinterpret_cast<float*>(data)[i] = row[d];
      } else if (p.format == WeightFormat::kBFloat16) {
        reinterpret_cast<BFloat16*>(data)[i] = narrow<BFloat16>(row[d]);
      } else if (scale > 0) {
        const float steps = std::nearbyint(row[d] / scale);
        reinterpret_cast<int8_t*>(data)[i] = static_cast<int8_t>(std::min(127.0f, std::max(-127.0f, steps)));
      }
    }
  }
}

}  // namespace

void pack_linear_cpu(const PackLinear& params) {
  parallel_for(0, divide_up(params.out_features, kPanelOutputs), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) pack_panel(params, panel);
  });
}

void packed_linear_cpu(const PackedLinear& params) {
  if (params.rows == 0) return;
  const int64_t grain = divide_up(kGrain, params.in_features * kPanelOutputs);
  parallel_for(0, divide_up(params.out_features, kPanelOutputs), grain,
               [&](int64_t begin, int64_t end) { multiply_panels(params, begin, end); });
}

}  // namespace dalle_fast
