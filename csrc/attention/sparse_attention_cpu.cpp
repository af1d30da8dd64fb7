// One (batch, head) is one task; the forward splits it further, by queries, when there are fewer tasks than threads.
// A task copies what it needs of k and v (or more, for the backward) into float32 or float64 buffers in the mask's own
// order, where the keys of neighbouring queries are neighbours: any strides and 16-bit inputs cost one pass, and a
// column is as contiguous as a row. Queries are taken in strips of six, which meet only the panels of keys that one of
// them sees. Several strips make a tile: they share the text, and their scores fit the cache, so the softmax is the
// plain two-pass one.
//
// Nothing is shared between tasks and every sum has a fixed order: results do not depend on the number of threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "attention/cpu_plan.h"
#include "attention/params.h"
#include "cpu/huge_pages.h"
#include "cpu/tile_math.h"

namespace dalle_fast {

using namespace attention;

namespace {

constexpr int kTileStrips = 8;
constexpr int kTileRows = kTileStrips * kStripRows;

// Scores are in units of log 2, since the kernels compute powers of 2.
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Zeroed and aligned to cache lines.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(::operator new(size * sizeof(T), kAlign))), size_(size) {
    clear();
  }
  T* get() const { return data_.get(); }
  void clear() { std::fill_n(data_.get(), size_, T(0)); }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Delete {
    void operator()(T* data) const { ::operator delete(data, kAlign); }
  };
  std::unique_ptr<T, Delete> data_;
  int64_t size_;
};

// Some neighbouring strips.
template <typename P>
struct TileOf {
  const P& problem;
  const Strip* strips;
  int count;

  TileOf(const P& p, int index)
      : problem(p),
        strips(p.plan.strips.data() + index * kTileStrips),
        count(std::min<int>(kTileStrips, p.plan.strips.size() - index * kTileStrips)) {}

  static int count_of(const P& p) { return (static_cast<int>(p.plan.strips.size()) + kTileStrips - 1) / kTileStrips; }

  // Rows of the strips' queries; those past the end of a strip are 0.
  template <typename Storage, typename T>
  void pack(const View& view, int b, int h, T scale, T* to) const {
    const Head<const Storage> from(view, b, h);
    with_channel_stride(from.channel, [&](auto stride) {
      for (int s = 0; s < count; ++s) {
        for (int r = 0; r < kStripRows; ++r, to += problem.width) {
          if (r >= strips[s].count) {
            std::fill_n(to, problem.width, T(0));
            continue;
          }
          const Storage* row = from.data + problem.token(strips[s].first + r) * from.token;
          pack_row(row, stride, problem.channels, scale, to);
        }
      }
    });
  }

  // Calls f(strip, row of the tile, token) for each query.
  template <typename F>
  void for_each_query(F&& f) const {
    for (int s = 0; s < count; ++s) {
      for (int r = 0; r < strips[s].count; ++r) f(s * kStripRows + r, problem.token(strips[s].first + r));
    }
  }

  template <typename Storage, typename T>
  void unpack(const T* from, const T* scales, const View& view, int b, int h) const {
    const Head<Storage> to(view, b, h);
    with_channel_stride(to.channel, [&](auto stride) {
      for_each_query([&](int row, int64_t token) {
        unpack_row(from + row * problem.width, problem.channels, scales[row], to.data + token * to.token, stride);
      });
    });
  }

  template <typename Storage>
  DF_ALWAYS_INLINE void prefetch(const View& view, int b, int h) const {
    const Head<Storage> head(view, b, h);
    for (int s = 0; s < count; ++s) prefetch_rows(head, problem, strips[s].first, strips[s].count);
  }

  // Calls f(first strip, strips, slot of the first key, panel of the scores): all strips at once for the text.
  template <typename F>
  void for_each_panel(F&& f) const {
    int first = 0;
    for (int panel = 0; panel < strips[count - 1].text_panels; ++panel) {
      while (strips[first].text_panels <= panel) ++first;
      f(first, count - first, panel * P::kKeys, panel);
    }
    for (int s = 0; s < count; ++s) {
      int panel = strips[s].text_panels;
      for (int i = panel > 0 ? 1 : 0; i < strips[s].spans; ++i) {  // the text is the first, if there is any
        const KeySpan span = problem.plan.spans[strips[s].first_span + i];
        for (int key = 0; key < span.count; key += P::kKeys) f(s, 1, span.slot + key, panel++);
      }
    }
  }

  // scores = rows . keys
  template <typename T>
  void score(const T* rows, T* keys, T* scores) const {
    for_each_panel([&](int first, int n, int slot, int panel) {
      const KeyColumns<T> at = keys_at(keys, problem, slot);
      problem.kernels.score(problem.width, n, rows + first * kStripRows * problem.width, at.data, at.row,
                            scores + first * problem.scores_strip + panel * kPanelSize<T>, problem.scores_strip);
    });
  }

  // keys += weights^T rows
  template <typename T>
  void accumulate(const T* rows, const T* weights, T* keys) const {
    for_each_panel([&](int first, int n, int slot, int panel) {
      const KeyColumns<T> at = keys_at(keys, problem, slot);
      problem.kernels.accumulate(problem.width, n, rows + first * kStripRows * problem.width,
                                 weights + first * problem.scores_strip + panel * kPanelSize<T>, problem.scores_strip,
                                 at.data, at.row);
    });
  }

  // out = weights rows
  template <typename T>
  void weigh(const T* weights, const T* rows, T* out) const {
    for (int64_t d = 0; d < problem.width; d += P::kKeys) {
      for (int s = 0; s < count; ++s) {
        problem.kernels.weigh(problem.width, weights + s * problem.scores_strip,
                              problem.plan.spans.data() + strips[s].first_span, strips[s].spans,
                              rows + d * problem.slots, out + s * kStripRows * problem.width + d);
      }
    }
  }

  template <typename T>
  void hide(int s, T* scores) const {
    problem.kernels.hide(problem.plan.masks.data() + strips[s].first_mask, strips[s].masks, scores);
  }
};

template <typename Storage, typename Mask>
void forward(const SparseAttentionForward& p, const Mask& mask) {
  using T = Arithmetic<Storage>;
  const AttentionShape& shape = p.shape;
  using P = Problem<T, Mask>;
  const P problem(mask, shape.channels);
  const int tiles = TileOf<P>::count_of(problem);
  const int64_t heads = int64_t{shape.batch} * shape.heads, threads = torch::stable::get_num_threads();
  const int64_t splits = std::clamp<int64_t>((threads + heads - 1) / heads, 1, tiles);
  advise_huge(p.out.data, heads * problem.seq_len * shape.channels * sizeof(Storage));

  torch::stable::parallel_for(0, heads * splits, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> keys(problem.keys_size()), values(problem.rows_size());
    Buffer<T> rows(P::kKeys * problem.width), queries(kTileRows * problem.width), out(kTileRows * problem.width);
    Buffer<T> scores(kTileStrips * problem.scores_strip);
    for (int64_t task = begin; task < end; ++task) {
      const int b = task / splits / shape.heads, h = task / splits % shape.heads, split = task % splits;
      pack_keys(Head<const Storage>(p.k, b, h), problem, rows.get(), keys.get());
      pack_rows(Head<const Storage>(p.v, b, h), problem, values.get());
      T* lse = static_cast<T*>(p.lse) + (int64_t{b} * shape.heads + h) * problem.seq_len;
      for (int index = split * tiles / splits; index < (split + 1) * tiles / splits; ++index) {
        const TileOf<P> tile(problem, index);
        tile.template pack<Storage>(p.q, b, h, T(shape.scale * kLog2E), queries.get());
        tile.template prefetch<Storage>(p.out, b, h);
        if (index + 1 < tiles) TileOf<P>(problem, index + 1).template prefetch<Storage>(p.q, b, h);
        tile.score(queries.get(), keys.get(), scores.get());
        T maxima[kTileRows], sums[kTileRows];
        for (int s = 0; s < tile.count; ++s) {
          T* strip = scores.get() + s * problem.scores_strip;
          tile.hide(s, strip);
          problem.kernels.softmax(tile.strips[s].panels, strip, maxima + s * kStripRows, sums + s * kStripRows);
        }
        tile.weigh(scores.get(), values.get(), out.get());
        tile.for_each_query([&](int row, int64_t token) {
          lse[token] = maxima[row] * T(kLn2) + std::log(sums[row]);
          sums[row] = 1 / sums[row];
        });
        tile.template unpack<Storage>(out.get(), sums, p.out, b, h);
      }
    }
  });
}

template <typename Storage, typename Mask>
void backward(const SparseAttentionBackward& p, const Mask& mask) {
  using T = Arithmetic<Storage>;
  const AttentionShape& shape = p.shape;
  using P = Problem<T, Mask>;
  const P problem(mask, shape.channels);
  const int tiles = TileOf<P>::count_of(problem);
  const int64_t heads = int64_t{shape.batch} * shape.heads;
  for (const View& gradient : {p.dq, p.dk, p.dv}) {
    advise_huge(gradient.data, heads * problem.seq_len * shape.channels * sizeof(Storage));
  }

  torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> keys(problem.keys_size()), values(problem.keys_size()), key_rows(problem.rows_size());
    Buffer<T> dk(problem.keys_size()), dv(problem.keys_size());
    const int64_t tile_size = kTileRows * problem.width;
    Buffer<T> rows(P::kKeys * problem.width), queries(tile_size), dout(tile_size), out(tile_size), dq(tile_size);
    Buffer<T> scores(kTileStrips * problem.scores_strip), dscores(kTileStrips * problem.scores_strip);
    T scales[kTileRows];
    std::fill_n(scales, kTileRows, T(shape.scale));
    for (int64_t task = begin; task < end; ++task) {
      const int b = task / shape.heads, h = task % shape.heads;
      const T* lse = static_cast<const T*>(p.lse) + task * problem.seq_len;
      pack_keys(Head<const Storage>(p.k, b, h), problem, rows.get(), keys.get());
      pack_keys(Head<const Storage>(p.v, b, h), problem, rows.get(), values.get());
      pack_rows(Head<const Storage>(p.k, b, h), problem, key_rows.get());
      dk.clear();
      dv.clear();
      for (int index = 0; index < tiles; ++index) {
        const TileOf<P> tile(problem, index);
        tile.template pack<Storage>(p.q, b, h, T(shape.scale * kLog2E), queries.get());
        tile.template prefetch<Storage>(p.dq, b, h);
        if (index + 1 < tiles) {
          const TileOf<P> next(problem, index + 1);
          for (const View* view : {&p.q, &p.dout, &p.out}) next.template prefetch<Storage>(*view, b, h);
        }
        tile.template pack<Storage>(p.dout, b, h, T(1), dout.get());
        tile.template pack<Storage>(p.out, b, h, T(1), out.get());
        tile.score(queries.get(), keys.get(), scores.get());
        tile.score(dout.get(), values.get(), dscores.get());
        T lses[kTileRows] = {}, delta[kTileRows] = {};
        tile.for_each_query([&](int row, int64_t token) {
          lses[row] = lse[token] * T(kLog2E);
          delta[row] = dot(dout.get() + row * problem.width, out.get() + row * problem.width, problem.width);
        });
        for (int s = 0; s < tile.count; ++s) {
          T* strip = scores.get() + s * problem.scores_strip;
          tile.hide(s, strip);
          problem.kernels.softmax_backward(tile.strips[s].panels, strip, dscores.get() + s * problem.scores_strip,
                                           lses + s * kStripRows, delta + s * kStripRows);
        }
        tile.weigh(dscores.get(), key_rows.get(), dq.get());
        tile.accumulate(dout.get(), scores.get(), dv.get());
        tile.accumulate(queries.get(), dscores.get(), dk.get());
        tile.template unpack<Storage>(dq.get(), scales, p.dq, b, h);
      }
      unpack_keys(dk.get(), problem, T(kLn2), rows.get(),
                  Head<Storage>(p.dk, b, h));  // the queries carry the scale and log2(e)
      unpack_keys(dv.get(), problem, T(1), rows.get(), Head<Storage>(p.dv, b, h));
    }
  });
}

}  // namespace

void sparse_attention_forward_cpu(const SparseAttentionForward& params) {
  with_mask(params.shape.kind, params.shape.grid, [&](const auto& mask) {
    with_format(params.shape.format, [&](auto element) { forward<decltype(element)>(params, mask); });
  });
}

void sparse_attention_backward_cpu(const SparseAttentionBackward& params) {
  with_mask(params.shape.kind, params.shape.grid, [&](const auto& mask) {
    with_format(params.shape.format, [&](auto element) { backward<decltype(element)>(params, mask); });
  });
}

}  // namespace dalle_fast
