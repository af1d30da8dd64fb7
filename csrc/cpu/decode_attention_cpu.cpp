// One task is a candidate and a head: it stores the new key and value, scores the text and the cached tokens that the
// mask keeps, and weighs their values. Everything is read once, in order; 16-bit rows are widened one at a time.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>

#include <type_traits>
#include <vector>

#include "../attention_params.h"
#include "tile_math.h"

namespace dalle_fast {
namespace {

template <typename Storage>
Storage* at(const View& view, int64_t batch, int64_t head, int64_t token) {
  return static_cast<Storage*>(view.data) + batch * view.batch + head * view.head + token * view.token;
}

// The row's elements as T: where they are if they are T and contiguous, else in `buffer`.
template <typename Storage, typename T>
const T* load(const Storage* row, int64_t stride, int channels, T* buffer) {
  if constexpr (std::is_same_v<Storage, T>) {
    if (stride == 1) return row;
  }
  for (int d = 0; d < channels; ++d) buffer[d] = static_cast<T>(row[d * stride]);
  return buffer;
}

template <typename Storage, typename T, typename Mask>
void decode(const DecodeAttention& p, const Mask& mask) {
  const AttentionShape& shape = p.shape;
  const int channels = shape.channels, repeat = shape.batch / p.prompts;
  const int query = mask.position(static_cast<int>(*p.position));
  const int slot = mask.cache_slot(query);

  // Calls visit(view of the text, view of the cache, batch index, token index) for each key, text first.
  const auto for_each_key = [&](int c, const View& text, const View& cache, auto&& visit) {
    for (int i = 0; i < mask.text_len; ++i) visit(text, c / repeat, i);
    for (int i = 0; i < mask.runs(); ++i) {
      const KeyRange run = mask.run(query, i);
      for (int key = run.begin; key < run.end; ++key) visit(cache, c, mask.cache_slot(key));
    }
  };

  torch::stable::parallel_for(0, int64_t{shape.batch} * shape.heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> scores(mask.seq_len()), scaled(channels), row(channels), sum(channels);
    for (int64_t task = begin; task < end; ++task) {
      const int c = task / shape.heads, h = task % shape.heads;
      const Storage* q = at<const Storage>(p.q, c, h, 0);
      const Storage* k = at<const Storage>(p.k, c, h, 0);
      const Storage* v = at<const Storage>(p.v, c, h, 0);
      Storage* new_key = at<Storage>(p.cache_k, c, h, slot);
      Storage* new_value = at<Storage>(p.cache_v, c, h, slot);
      for (int d = 0; d < channels; ++d) {
        new_key[d * p.cache_k.channel] = k[d * p.k.channel];
        new_value[d * p.cache_v.channel] = v[d * p.v.channel];
        scaled[d] = static_cast<T>(q[d * p.q.channel]) * static_cast<T>(shape.scale);
      }

      int64_t keys = 0;
      for_each_key(c, p.text_k, p.cache_k, [&](const View& view, int batch, int token) {
        const T* key = load(at<const Storage>(view, batch, h, token), view.channel, channels, row.data());
        scores[keys++] = dot(scaled.data(), key, channels);
      });
      T total;
      exp_row(scores.data(), keys, &total);

      std::fill(sum.begin(), sum.end(), T(0));
      keys = 0;
      for_each_key(c, p.text_v, p.cache_v, [&](const View& view, int batch, int token) {
        const T* value = load(at<const Storage>(view, batch, h, token), view.channel, channels, row.data());
        add_scaled(value, scores[keys++], channels, sum.data());
      });
      Storage* out = at<Storage>(p.out, c, h, 0);
      for (int d = 0; d < channels; ++d) out[d * p.out.channel] = static_cast<Storage>(sum[d] / total);
    }
  });
}

}  // namespace

void decode_attention_cpu(const DecodeAttention& params) {
  with_mask(params.shape.kind, params.shape.grid, [&](const auto& mask) {
    switch (params.shape.dtype) {
      case DType::kFloat32:
        return decode<float, float>(params, mask);
      case DType::kFloat64:
        return decode<double, double>(params, mask);
      case DType::kBFloat16:
        return decode<c10::BFloat16, float>(params, mask);
    }
  });
}

}  // namespace dalle_fast
