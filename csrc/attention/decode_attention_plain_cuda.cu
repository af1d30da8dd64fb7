// Decode attention of any dtype, layout and number of channels, without tensor cores: float32 and float64, for which
// those are not precise enough, and 16-bit tensors whose rows they cannot take.
//
// A warp owns a head of one candidate and reads the text for itself. It takes 32 keys at a time: first every lane
// scores one of them, then the lanes add the values, 128 channels at once. Scores need all channels: with more than 128
// channels, scores are computed again for every 128.
#include <cmath>

#include "attention/cuda_decode_attention.h"
#include "attention/cuda_stream_mask.h"
#include "common/format.h"
#include "cuda/device.h"
#include "cuda/reduce.h"

namespace dalle_fast::attention {
namespace {

constexpr int kWarps = 4;
constexpr int kOwned = 4;  // channels of a lane
constexpr int kPiece = kOwned * kWarp;

// The rows of one head.
template <typename T>
struct HeadRows {
  T* data;
  int64_t token, channel;  // strides in elements

  DF_DEVICE HeadRows(const View& view, int batch, int head)
      : data(static_cast<T*>(view.data) + batch * view.batch + head * view.head),
        token(view.token),
        channel(view.channel) {}

  DF_DEVICE T* at(int row, int d) const { return data + row * token + d * channel; }
};

// The online softmax of one query over 128 channels of the values.
template <typename T>
class Query {
 public:
  using C = Arithmetic<T>;

  // 32 keys that have been scored, in shared memory.
  struct Keys {
    C weight[kWarp];
    int row[kWarp];
  };

  DF_DEVICE Query(const HeadRows<const T>& q, int channels, C scale, int first_channel, Keys* keys)
      : q_(q), channels_(channels), scale_(scale), first_channel_(first_channel), keys_(keys) {}

  // Adds n keys; `row` is the one that the lane scores.
  DF_DEVICE void add(const HeadRows<const T>& k, const HeadRows<const T>& v, int row, int n) {
    const int lane = threadIdx.x % kWarp;
    C score = -INFINITY;
    if (lane < n) {
      score = 0;
      for (int d = 0; d < channels_; ++d) score += static_cast<C>(widen(*q_.at(0, d))) * widen(*k.at(row, d));
      score *= scale_;
    }
    const C most = warp_reduce(score > maximum_ ? score : maximum_, Larger{});
    const C correction = std::exp(maximum_ - most), weight = std::exp(score - most);
    maximum_ = most;
    sum_ = sum_ * correction + warp_reduce(weight, Add{});
    for (C& x : out_) x *= correction;

    keys_->weight[lane] = weight;
    keys_->row[lane] = row;
    __syncwarp();
    for (int i = 0; i < n; ++i) {
      for_each_channel([&](int d, int j) { out_[j] += keys_->weight[i] * widen(*v.at(keys_->row[i], d)); });
    }
    __syncwarp();
  }

  DF_DEVICE void store(const HeadRows<T>& out) const {
    const C inverse = 1 / sum_;
    for_each_channel([&](int d, int j) { *out.at(0, d) = narrow<T>(out_[j] * inverse); });
  }

 private:
  // Calls f(channel, its index in the lane).
  template <typename F>
  DF_DEVICE void for_each_channel(F&& f) const {
    for (int j = 0; j < kOwned; ++j) {
      const int d = first_channel_ + j * kWarp + threadIdx.x % kWarp;
      if (d < channels_) f(d, j);
    }
  }

  const HeadRows<const T> q_;
  const int channels_;
  const C scale_;
  const int first_channel_;
  Keys* const keys_;
  C out_[kOwned] = {}, sum_ = 0, maximum_ = -INFINITY;
};

template <typename T>
__global__ void __launch_bounds__(kWarps* kWarp, 4) plain_kernel(DecodeAttention p) {
  __shared__ typename Query<T>::Keys shared[kWarps];
  const AttentionShape& shape = p.shape;
  const int warp = threadIdx.x / kWarp, owned = blockIdx.x * kWarps + warp;
  if (owned >= shape.batch * shape.heads) return;
  const int candidate = owned / shape.heads, head = owned % shape.heads;

  const int64_t position = *p.position;
  if (!is_inside(position, shape.grid)) {  // must not move an address: NaN, and the caches stay as they are
    const HeadRows<T> out(p.out, candidate, head);
    for (int d = threadIdx.x % kWarp; d < shape.channels; d += kWarp) *out.at(0, d) = narrow<T>(NAN);
    return;
  }
  const StreamMask mask{shape.kind, shape.grid};
  const int lane = threadIdx.x % kWarp, text_len = shape.grid.text_len, prompt = candidate / (shape.batch / p.prompts);
  const auto slot_of = [&](int key) {
    return mask.with_image_mask([=](const auto& image) { return image.cache_slot(key - text_len); });
  };
  const int query =
      text_len + mask.with_image_mask([=](const auto& image) { return image.position(static_cast<int>(position)); });

  const HeadRows<const T> new_k(p.k, candidate, head), new_v(p.v, candidate, head);
  const HeadRows<T> cache_k(p.cache_k, candidate, head), cache_v(p.cache_v, candidate, head);
  for (int d = lane; d < shape.channels; d += kWarp) {
    *cache_k.at(slot_of(query), d) = *new_k.at(0, d);
    *cache_v.at(slot_of(query), d) = *new_v.at(0, d);
  }
  __syncwarp();

  for (int first_channel = 0; first_channel < shape.channels; first_channel += kPiece) {
    Query<T> q({p.q, candidate, head}, shape.channels, static_cast<Arithmetic<T>>(shape.scale), first_channel,
               shared + warp);
    for (int i = 0; i < mask.ranges(query); ++i) {
      const bool text = i == 0;
      const HeadRows<const T> k(text ? p.text_k : p.cache_k, text ? prompt : candidate, head);
      const HeadRows<const T> v(text ? p.text_v : p.cache_v, text ? prompt : candidate, head);
      const KeyRange range = mask.range(query, i);
      for (int key = range.begin; key < range.end; key += kWarp) {
        q.add(k, v, text ? key + lane : slot_of(key + lane), min(kWarp, range.end - key));
      }
    }
    q.store({p.out, candidate, head});
  }
}

}  // namespace

cudaError_t launch_plain_decode(const DecodeAttention& params, cudaStream_t stream) {
  return with_format(params.shape.format, [&](auto element) {
    const int blocks = (params.shape.batch * params.shape.heads + kWarps - 1) / kWarps;
    return launch(plain_kernel<decltype(element)>, blocks, kWarps * kWarp, 0, stream, params);
  });
}

}  // namespace dalle_fast::attention
