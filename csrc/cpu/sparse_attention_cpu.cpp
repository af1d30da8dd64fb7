// One (batch, head) is one task; the forward splits it further, by queries, when there are fewer tasks than threads.
// A task copies what it needs of k and v (or more, for the backward) into float32 or float64 buffers in the mask's own
// order, where the keys of neighbouring queries are neighbours: any strides and 16-bit inputs cost one pass, and a
// column is as contiguous as a row. Queries are taken kTile at a time, text and image apart; a tile sees two spans of
// keys, the text and one window of the image, and its scores fit the cache, so the softmax is the plain two-pass one.
//
// Nothing is shared between tasks and every sum has a fixed order: results do not depend on the number of threads.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "../attention_params.h"
#include "tile_math.h"

namespace dalle_fast {
namespace {

constexpr int kTile = 24;  // queries

// Zeroed and aligned to cache lines.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(::operator new(size * sizeof(T), kAlign))) {
    std::fill_n(data_.get(), size, T(0));
  }
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Delete {
    void operator()(T* data) const { ::operator delete(data, kAlign); }
  };
  std::unique_ptr<T, Delete> data_;
};

// Keys `first` ... in the mask's order, and the column of the score tile where they start.
struct Span {
  int first;
  int count;
  int64_t column;
};

struct Tile {
  int first;
  int count;        // queries
  Span spans[2];    // of keys: text, image
  int64_t columns;  // of the score tile
};

// The mask over the whole stream: text first, then the image in the mask's own order.
template <typename Mask, typename T>
struct Stream {
  Mask mask;
  int text_len = mask.text_len;
  int image_len = mask.image_len();
  int seq_len = mask.seq_len();
  int64_t text_columns = round_to_columns<T>(text_len);
  int64_t max_columns = text_columns + round_to_columns<T>(image_len);
  int text_tiles = (text_len + kTile - 1) / kTile;
  int tiles = text_tiles + (image_len + kTile - 1) / kTile;

  explicit Stream(const Mask& m) : mask(m) {}

  int64_t token(int i) const { return i < text_len ? i : text_len + mask.token(i - text_len); }

  Tile tile(int index) const {
    if (index < text_tiles) {
      const int first = index * kTile, count = std::min(kTile, text_len - first), keys = first + count;
      return {first, count, {{0, keys, 0}, {}}, round_to_columns<T>(keys)};
    }
    const int first = (index - text_tiles) * kTile, count = std::min(kTile, image_len - first);
    const int begin = mask.first_key(first), keys = mask.last_key(first + count - 1) + 1 - begin;
    return {text_len + first,
            count,
            {{0, text_len, 0}, {text_len + begin, keys, text_columns}},
            text_columns + round_to_columns<T>(keys)};
  }

  // Sets the scores that query tile.first + r must not see to -inf.
  void hide(const Tile& tile, int r, T* row) const {
    const int query = tile.first + r;
    int64_t column = 0;
    const auto keep = [&](int64_t begin, int64_t end) {
      std::fill(row + column, row + std::max(begin, column), -std::numeric_limits<T>::infinity());
      column = std::max(end, column);
    };
    keep(0, std::min(query + 1, text_len));
    if (query >= text_len) {
      const int64_t shift = tile.spans[1].column - (tile.spans[1].first - text_len);
      for (int i = 0; i < mask.runs(); ++i) {
        const KeyRange run = mask.run(query - text_len, i);
        if (run.begin < run.end) keep(run.begin + shift, run.end + shift);
      }
    }
    keep(tile.columns, tile.columns);
  }
};

// One head of a tensor.
template <typename Storage>
struct Head {
  Storage* data;
  int64_t token, channel;  // strides in elements

  Head(const View& view, int b, int h)
      : data(static_cast<Storage*>(view.data) + b * view.batch + h * view.head),
        token(view.token),
        channel(view.channel) {}
};

// Calls f with the stride between channels, as a constant where it is 1, which lets the loops vectorise.
template <typename F>
void with_channel_stride(int64_t stride, F&& f) {
  if (stride == 1) {
    f(std::integral_constant<int64_t, 1>());
  } else {
    f(stride);
  }
}

// to[i, d] = element (first + i, d) of the head times scale; rows of `pitch` elements.
template <typename Storage, typename S, typename T>
void pack_rows(const Head<Storage>& from, const S& stream, int first, int count, int channels, T scale, int64_t pitch,
               T* to) {
  with_channel_stride(from.channel, [&](auto stride) {
    for (int i = 0; i < count; ++i) {
      const Storage* row = from.data + stream.token(first + i) * from.token;
      for (int d = 0; d < channels; ++d) to[i * pitch + d] = static_cast<T>(row[d * stride]) * scale;
    }
  });
}

// to[d, i] = element (i, d) of the head; rows of `pitch` elements. A block of tokens at a time, so that whole cache
// lines are written.
template <typename Storage, typename S, typename T>
void pack_columns(const Head<Storage>& from, const S& stream, int channels, int64_t pitch, T* to) {
  constexpr int kBlock = kColumns<T>;
  with_channel_stride(from.channel, [&](auto stride) {
    for (int first = 0; first < stream.seq_len; first += kBlock) {
      const Storage* rows[kBlock];
      for (int i = 0; i < kBlock; ++i) {  // past the end, the last token again: its columns are never used
        rows[i] = from.data + stream.token(std::min(first + i, stream.seq_len - 1)) * from.token;
      }
      for (int d = 0; d < channels; ++d) {
        for (int i = 0; i < kBlock; ++i) to[d * pitch + first + i] = static_cast<T>(rows[i][d * stride]);
      }
    }
  });
}

// Element (first + i, d) of the head = from[i, d] * scale.
template <typename Storage, typename S, typename T>
void unpack_rows(const T* from, int64_t pitch, const S& stream, int first, int count, int channels, T scale,
                 const Head<Storage>& to) {
  with_channel_stride(to.channel, [&](auto stride) {
    for (int i = 0; i < count; ++i) {
      Storage* row = to.data + stream.token(first + i) * to.token;
      for (int d = 0; d < channels; ++d) row[d * stride] = static_cast<Storage>(from[i * pitch + d] * scale);
    }
  });
}

// Element (i, first column + j) of the score tile = left[i] . keys[:, j], for both spans; keys are [channels, pitch].
template <typename T>
void score(const Tile& tile, int64_t channels, const T* left, int64_t left_row, const T* keys, int64_t pitch, T* scores,
           int64_t columns) {
  for (const Span& span : tile.spans) {
    gemm(tile.count, span.count, channels, {left, left_row, 1}, keys + span.first, pitch, scores + span.column, columns,
         false);
  }
}

// out[i] = sum over the keys j of both spans of weights[i, j] rows[j].
template <typename T>
void weigh(const Tile& tile, const T* weights, int64_t columns, const T* rows, int64_t width, T* out) {
  bool accumulate = false;
  for (const Span& span : tile.spans) {
    if (span.count == 0) continue;
    gemm(tile.count, width, span.count, {weights + span.column, columns, 1}, rows + span.first * width, width, out,
         width, accumulate);
    accumulate = true;
  }
}

// rows[j] += sum over the tile's queries i of weights[i, j] left[i], for the keys j of both spans.
template <typename T>
void scatter(const Tile& tile, const T* weights, int64_t columns, const T* left, int64_t width, T* rows) {
  for (const Span& span : tile.spans) {
    gemm(span.count, width, tile.count, {weights + span.column, 1, columns}, left, width, rows + span.first * width,
         width, true);
  }
}

// Elements from one channel's keys to the next: room for the product to read past the last key, and no multiple of 4
// KB, which would map all channels to the same few cache lines.
template <typename T>
int64_t key_pitch(int seq_len) {
  const int64_t pitch = round_to_columns<T>(seq_len) + kColumns<T>;
  return pitch * sizeof(T) % 4096 == 0 ? pitch + kColumns<T> : pitch;
}

template <typename Storage, typename T, typename Mask>
void forward(const SparseAttentionForward& p, const Mask& mask) {
  const Stream<Mask, T> stream(mask);
  const AttentionShape& shape = p.shape;
  const int channels = shape.channels;
  const int64_t width = round_to_columns<T>(channels), pitch = key_pitch<T>(stream.seq_len);
  const int64_t columns = stream.max_columns, heads = int64_t{shape.batch} * shape.heads;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t splits = std::clamp<int64_t>((threads + heads - 1) / heads, 1, stream.tiles);

  torch::stable::parallel_for(0, heads * splits, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> keys(channels * pitch), values(stream.seq_len * width), queries(kTile * width), out(kTile * width);
    Buffer<T> scores(kTile * columns);
    for (int64_t task = begin; task < end; ++task) {
      const int b = task / splits / shape.heads, h = task / splits % shape.heads, split = task % splits;
      pack_columns(Head<const Storage>(p.k, b, h), stream, channels, pitch, keys.get());
      pack_rows(Head<const Storage>(p.v, b, h), stream, 0, stream.seq_len, channels, T(1), width, values.get());
      T* lse = static_cast<T*>(p.lse) + (int64_t{b} * shape.heads + h) * stream.seq_len;
      for (int index = split * stream.tiles / splits; index < (split + 1) * stream.tiles / splits; ++index) {
        const Tile tile = stream.tile(index);
        pack_rows(Head<const Storage>(p.q, b, h), stream, tile.first, tile.count, channels, T(shape.scale), width,
                  queries.get());
        score(tile, channels, queries.get(), width, keys.get(), pitch, scores.get(), columns);
        T sums[kTile];
        for (int r = 0; r < tile.count; ++r) {
          T* row = scores.get() + r * columns;
          stream.hide(tile, r, row);
          const T max = exp_row(row, tile.columns, &sums[r]);
          lse[stream.token(tile.first + r)] = max + std::log(sums[r]);
        }
        weigh(tile, scores.get(), columns, values.get(), width, out.get());
        for (int r = 0; r < tile.count; ++r) {
          unpack_rows(out.get() + r * width, width, stream, tile.first + r, 1, channels, 1 / sums[r],
                      Head<Storage>(p.out, b, h));
        }
      }
    }
  });
}

template <typename Storage, typename T, typename Mask>
void backward(const SparseAttentionBackward& p, const Mask& mask) {
  const Stream<Mask, T> stream(mask);
  const AttentionShape& shape = p.shape;
  const int channels = shape.channels, seq_len = stream.seq_len;
  const int64_t width = round_to_columns<T>(channels), pitch = key_pitch<T>(seq_len), columns = stream.max_columns;

  torch::stable::parallel_for(0, int64_t{shape.batch} * shape.heads, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> keys(channels * pitch), values(channels * pitch), key_rows(seq_len * width);
    Buffer<T> queries(kTile * width), dout(kTile * width), out(kTile * width), dq(kTile * width);
    Buffer<T> scores(kTile * columns), dscores(kTile * columns), dk(seq_len * width), dv(seq_len * width);
    for (int64_t task = begin; task < end; ++task) {
      const int b = task / shape.heads, h = task % shape.heads;
      const T* lse = static_cast<const T*>(p.lse) + task * seq_len;
      pack_columns(Head<const Storage>(p.k, b, h), stream, channels, pitch, keys.get());
      pack_columns(Head<const Storage>(p.v, b, h), stream, channels, pitch, values.get());
      pack_rows(Head<const Storage>(p.k, b, h), stream, 0, seq_len, channels, T(1), width, key_rows.get());
      std::fill_n(dk.get(), seq_len * width, T(0));
      std::fill_n(dv.get(), seq_len * width, T(0));
      for (int index = 0; index < stream.tiles; ++index) {
        const Tile tile = stream.tile(index);
        const auto pack = [&](const View& view, T scale, Buffer<T>& to) {
          pack_rows(Head<const Storage>(view, b, h), stream, tile.first, tile.count, channels, scale, width, to.get());
        };
        pack(p.q, T(shape.scale), queries);
        pack(p.dout, T(1), dout);
        pack(p.out, T(1), out);
        score(tile, channels, queries.get(), width, keys.get(), pitch, scores.get(), columns);
        score(tile, channels, dout.get(), width, values.get(), pitch, dscores.get(), columns);
        for (int r = 0; r < tile.count; ++r) {
          T* row = scores.get() + r * columns;
          stream.hide(tile, r, row);
          const T delta = dot(dout.get() + r * width, out.get() + r * width, width);
          softmax_backward_row(row, dscores.get() + r * columns, tile.columns, lse[stream.token(tile.first + r)],
                               delta);
        }
        weigh(tile, dscores.get(), columns, key_rows.get(), width, dq.get());
        scatter(tile, scores.get(), columns, dout.get(), width, dv.get());
        scatter(tile, dscores.get(), columns, queries.get(), width, dk.get());  // the queries carry the scale
        unpack_rows(dq.get(), width, stream, tile.first, tile.count, channels, T(shape.scale),
                    Head<Storage>(p.dq, b, h));
      }
      unpack_rows(dk.get(), width, stream, 0, seq_len, channels, T(1), Head<Storage>(p.dk, b, h));
      unpack_rows(dv.get(), width, stream, 0, seq_len, channels, T(1), Head<Storage>(p.dv, b, h));
    }
  });
}

}  // namespace

void sparse_attention_forward_cpu(const SparseAttentionForward& params) {
  with_mask(params.shape.kind, params.shape.grid, [&](const auto& mask) {
    switch (params.shape.dtype) {
      case DType::kFloat32:
        return forward<float, float>(params, mask);
      case DType::kFloat64:
        return forward<double, double>(params, mask);
      case DType::kBFloat16:
        return forward<c10::BFloat16, float>(params, mask);
    }
  });
}

void sparse_attention_backward_cpu(const SparseAttentionBackward& params) {
  with_mask(params.shape.kind, params.shape.grid, [&](const auto& mask) {
    switch (params.shape.dtype) {
      case DType::kFloat32:
        return backward<float, float>(params, mask);
      case DType::kFloat64:
        return backward<double, double>(params, mask);
      case DType::kBFloat16:
        return backward<c10::BFloat16, float>(params, mask);
    }
  });
}

}  // namespace dalle_fast
