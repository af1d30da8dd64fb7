// The product of a few rows and a few panels, for one instruction set (cpu/each_simd.h).

typedef float Vector __attribute__((vector_size(DF_VECTOR_BYTES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(DF_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(DF_VECTOR_BYTES), aligned(4), may_alias));

constexpr int kVectors = kPanelOutputs * 4 / DF_VECTOR_BYTES;  // registers for the outputs of a panel

// Input `k` of a line, for the outputs of register `v`, as float32.
template <WeightFormat format>
DF_TARGET DF_ALWAYS_INLINE void load_weights(const char* line, int k, int v, Vector& weights) {
  const Words words = reinterpret_cast<const Words*>(line)[v];
  if constexpr (format == WeightFormat::kFloat32) {
    weights = reinterpret_cast<Vector>(words);
  } else if constexpr (format == WeightFormat::kBFloat16) {
    weights = reinterpret_cast<Vector>(k == 0 ? words << 16 : words & 0xFFFF0000u);
  } else {
    const Integers top = reinterpret_cast<Integers>(k == 3 ? words : words << (24 - 8 * k));
    weights = __builtin_convertvector(top >> 24, Vector);
  }
}

// An int8 panel as a float32 panel: worth it for many rows.
DF_TARGET inline void unpack_int8(const char* panel, int64_t lines, char* wide) {
  for (const char* line = panel; line < panel + lines * kLineBytes; line += kLineBytes) {
    for (int k = 0; k < line_depth(WeightFormat::kInt8); ++k, wide += kLineBytes) {
      for (int v = 0; v < kVectors; ++v)
        load_weights<WeightFormat::kInt8>(line, k, v, reinterpret_cast<Vector*>(wide)[v]);
    }
  }
}

// sums[kRows, kPanels, kPanelOutputs] = x[kRows, in] multiplied by kPanels panels. Meanwhile the memory
// from `next` on is fetched, next_step bytes per line.
template <WeightFormat format, int kRows, int kPanels>
DF_TARGET void tile(const float* x, int64_t in, const char* panels, int64_t panel_bytes, const char* next,
                    int64_t next_step, float* sums) {
  constexpr int kDepth = line_depth(format);
  Vector sum[kRows][kPanels][kVectors] = {};
  const auto add_line = [&](int64_t d, const char* line, int depth) __attribute__((always_inline)) DF_TARGET {
    for (int k = 0; k < depth; ++k) {
      for (int p = 0; p < kPanels; ++p) {
        Vector weights[kVectors];
        for (int v = 0; v < kVectors; ++v) load_weights<format>(line + p * panel_bytes, k, v, weights[v]);
        for (int r = 0; r < kRows; ++r) {
          for (int v = 0; v < kVectors; ++v) sum[r][p][v] += x[r * in + d + k] * weights[v];
        }
      }
    }
  };
  int64_t d = 0;
  for (; d + kDepth <= in; d += kDepth, panels += kLineBytes) {
    for (int p = 0; p < kPanels; ++p, next += next_step) __builtin_prefetch(next);
    add_line(d, panels, kDepth);
  }
  if (d < in) add_line(d, panels, static_cast<int>(in - d));
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        reinterpret_cast<Vector*>(sums + (r * kPanels + p) * kPanelOutputs)[v] = sum[r][p][v];
      }
    }
  }
}

// Number of panels that are read side by side: enough sums in flight to cover the latency of a multiply-add, and few
// enough for the registers.
constexpr int side_by_side(int rows) {
  const int panels = (rows == 1 ? 8 : rows <= 3 ? 4 : 2) / kVectors;
  return panels > 1 ? panels : 1;
}

template <WeightFormat format, int kRows>
constexpr Tile tile_of() {
  constexpr int kPanels = side_by_side(kRows);
  return {kPanels, tile<format, kRows, kPanels>, tile<format, kRows, 1>};
}

template <WeightFormat format>
constexpr Tile kTiles[kMaxRows] = {tile_of<format, 1>(), tile_of<format, 2>(), tile_of<format, 3>(),
                                   tile_of<format, 4>(), tile_of<format, 5>(), tile_of<format, 6>()};

constexpr Kernels kKernels = {
    {kTiles<WeightFormat::kFloat32>, kTiles<WeightFormat::kBFloat16>, kTiles<WeightFormat::kInt8>}, unpack_int8};
