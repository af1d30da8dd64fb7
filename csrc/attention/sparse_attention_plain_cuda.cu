// Sparse attention of any dtype, layout and number of channels, without tensor cores: float32 and float64, for which
// those are not precise enough, and 16-bit tensors whose shape they cannot take (on_tensor_cores() in params.h).
//
// A warp owns 128 channels of a query, or of a key for dk and dv, and meets the other side 32 tokens at a time. For the
// scores a lane takes a token, for the sums weighted with them a few channels. Scores need all channels: with more than
// 128 channels, scores are computed again for every 128.
#include <cmath>

#include "attention/cuda_sparse_attention.h"
#include "attention/cuda_stream_mask.h"
#include "common/format.h"
#include "cuda/device.h"
#include "cuda/reduce.h"

namespace dalle_fast::attention {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kOwned = 4;  // channels of a lane
constexpr int kPiece = kOwned * kWarp;

// One row of a tensor.
template <typename T>
struct Row {
  T* data;
  int64_t stride;  // of the channels

  DF_DEVICE auto operator[](int channel) const { return widen(data[channel * stride]); }
};

template <typename T>
struct Head {
  T* data;
  int64_t token, channel;  // strides in elements

  DF_DEVICE Head(const View& view, const AttentionShape& shape, int head)
      : data(static_cast<T*>(view.data) + head / shape.heads * view.batch + head % shape.heads * view.head),
        token(view.token),
        channel(view.channel) {}

  DF_DEVICE Row<T> operator[](int i) const { return {data + i * token, channel}; }
};

DF_HOST_DEVICE inline int blocks_of(const Grid& grid) { return (grid.seq_len() + kWarps - 1) / kWarps; }

// Part of a warp: a token of the stream in one head, and the channels of its lanes.
struct Part {
  StreamMask mask;
  int channels, piece;
  int head;       // b H + h
  int i;          // the token in the mask's order
  int token = 0;  // its index in memory

  DF_DEVICE explicit Part(const AttentionShape& shape)
      : mask{shape.kind, shape.grid}, channels(shape.channels), piece(blockIdx.y) {
    const int blocks = blocks_of(shape.grid);  // of a head
    head = blockIdx.x / blocks;
    i = blockIdx.x % blocks * kWarps + threadIdx.x / kWarp;
    if (inside()) token = mask.token(i);
  }

  DF_DEVICE bool inside() const { return i < mask.grid.seq_len(); }
  DF_DEVICE int64_t first_row() const { return int64_t{head} * mask.grid.seq_len(); }  // of lse and delta
  DF_DEVICE bool first_lane() const { return piece == 0 && threadIdx.x % kWarp == 0; }

  // Calls f(channel, its index in the lane).
  template <typename F>
  DF_DEVICE void for_each_channel(F&& f) const {
    for (int j = 0; j < kOwned; ++j) {
      const int d = piece * kPiece + j * kWarp + threadIdx.x % kWarp;
      if (d < channels) f(d, j);
    }
  }

  template <typename T>
  DF_DEVICE void store(const Arithmetic<T> (&x)[kOwned], Arithmetic<T> scale, const Head<T>& to) const {
    const Row<T> out = to[token];
    for_each_channel([&](int d, int j) { out.data[d * out.stride] = narrow<T>(x[j] * scale); });
  }
};

// 32 tokens of the other side, in shared memory; every lane of the warp calls every function.
template <typename T>
class Group {
 public:
  using C = Arithmetic<T>;

  // `token` is that of the lane.
  DF_DEVICE void set(int token) {
    __syncwarp();
    tokens_[threadIdx.x % kWarp] = token;
    __syncwarp();
  }

  // row . row of the lane's token
  DF_DEVICE C dot(const Row<const T>& row, const Head<const T>& head, int channels) {
    const int lane = threadIdx.x % kWarp;
    C sum = 0;
    for (int first = 0; first < channels; first += kWarp) {
      const int n = min(kWarp, channels - first);
      for (int j = 0; j < kWarp; ++j) rows_[j][lane] = lane < n ? head[tokens_[j]][first + lane] : C(0);
      __syncwarp();
      for (int d = 0; d < n; ++d) sum += rows_[lane][d] * row[first + d];
      __syncwarp();
    }
    return sum;
  }

  // sum += weights . rows, for the channels of the lane; `weight` is that of the lane's token.
  DF_DEVICE void weigh(C weight, const Head<const T>& head, const Part& part, C (&sum)[kOwned]) {
    __syncwarp();
    weights_[threadIdx.x % kWarp] = weight;
    __syncwarp();
    for (int j = 0; j < kWarp; ++j) {
      const Row<const T> row = head[tokens_[j]];
      part.for_each_channel([&](int d, int i) { sum[i] += weights_[j] * row[d]; });
    }
  }

 private:
  C rows_[kWarp][kWarp + 1];  // one more, so that a column lies in different banks
  C weights_[kWarp];
  int tokens_[kWarp];
};

// Calls f(whether the lane has a key) for each group of keys that the query sees.
template <typename T, typename F>
DF_DEVICE void for_each_group_of_keys(const Part& part, Group<T>& group, F&& f) {
  for (int n = 0; n < part.mask.ranges(part.i); ++n) {
    const KeyRange keys = part.mask.range(part.i, n);
    for (int first = keys.begin; first < keys.end; first += kWarp) {
      const int key = first + threadIdx.x % kWarp;
      group.set(part.mask.token(min(key, keys.end - 1)));
      f(key < keys.end);
    }
  }
}

// Calls f(whether the lane's query sees the key, its token) for each group of queries that may see it.
template <typename T, typename F>
DF_DEVICE void for_each_group_of_queries(const Part& part, Group<T>& group, F&& f) {
  const bool text = part.mask.is_text(part.i);
  const int end = text ? part.mask.grid.seq_len() : part.mask.queries_of(part.i, part.i).end;
  for (int first = part.i; first < end; first += kWarp) {
    const int query = first + threadIdx.x % kWarp, token = part.mask.token(min(query, end - 1));
    group.set(token);
    f(query < end && (part.mask.keep(query, part.i) & 1) != 0, token);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) forward_kernel(SparseAttentionForward p) {
  using C = Arithmetic<T>;
  __shared__ Group<T> groups[kWarps];
  Group<T>& group = groups[threadIdx.x / kWarp];
  const AttentionShape& shape = p.shape;
  const Part part(shape);
  if (!part.inside()) return;
  const Head<const T> k(p.k, shape, part.head), v(p.v, shape, part.head);
  const Row<const T> query = Head<const T>(p.q, shape, part.head)[part.token];

  const C scale = static_cast<C>(shape.scale);
  C out[kOwned] = {}, sum = 0, maximum = -INFINITY;
  for_each_group_of_keys(part, group, [&](bool inside) {
    const C product = group.dot(query, k, part.channels), score = inside ? product * scale : C(-INFINITY);
    const C most = warp_reduce(score > maximum ? score : maximum, Larger{});
    const C correction = std::exp(maximum - most), weight = std::exp(score - most);
    maximum = most;
    sum = sum * correction + weight;
    for (C& x : out) x *= correction;
    group.weigh(weight, v, part, out);
  });
  sum = warp_reduce(sum, Add{});
  part.store(out, 1 / sum, Head<T>(p.out, shape, part.head));
  if (part.first_lane()) static_cast<C*>(p.lse)[part.first_row() + part.token] = maximum + std::log(sum);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) dq_kernel(SparseAttentionBackward p) {
  using C = Arithmetic<T>;
  __shared__ Group<T> groups[kWarps];
  Group<T>& group = groups[threadIdx.x / kWarp];
  const AttentionShape& shape = p.shape;
  const Part part(shape);
  if (!part.inside()) return;
  const Head<const T> k(p.k, shape, part.head), v(p.v, shape, part.head), out(p.out, shape, part.head);
  const Row<const T> query = Head<const T>(p.q, shape, part.head)[part.token];
  const Row<const T> dout = Head<const T>(p.dout, shape, part.head)[part.token];

  const C scale = static_cast<C>(shape.scale), lse = static_cast<const C*>(p.lse)[part.first_row() + part.token];
  group.set(part.token);
  const C delta = group.dot(dout, out, part.channels);
  if (part.first_lane()) static_cast<C*>(p.delta)[part.first_row() + part.token] = delta;
  C dq[kOwned] = {};
  for_each_group_of_keys(part, group, [&](bool inside) {
    const C score = group.dot(query, k, part.channels) * scale, dweight = group.dot(dout, v, part.channels);
    group.weigh(inside ? std::exp(score - lse) * (dweight - delta) : C(0), k, part, dq);
  });
  part.store(dq, scale, Head<T>(p.dq, shape, part.head));
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) dkv_kernel(SparseAttentionBackward p) {
  using C = Arithmetic<T>;
  __shared__ Group<T> groups[kWarps];
  Group<T>& group = groups[threadIdx.x / kWarp];
  const AttentionShape& shape = p.shape;
  const Part part(shape);
  if (!part.inside()) return;
  const Head<const T> q(p.q, shape, part.head), dout(p.dout, shape, part.head);
  const Row<const T> key = Head<const T>(p.k, shape, part.head)[part.token];
  const Row<const T> value = Head<const T>(p.v, shape, part.head)[part.token];

  const C scale = static_cast<C>(shape.scale);
  const C* lse = static_cast<const C*>(p.lse) + part.first_row();
  const C* delta = static_cast<const C*>(p.delta) + part.first_row();
  C dk[kOwned] = {}, dv[kOwned] = {};
  for_each_group_of_queries(part, group, [&](bool sees, int query) {
    const C score = group.dot(key, q, part.channels) * scale, dweight = group.dot(value, dout, part.channels);
    const C weight = sees ? std::exp(score - lse[query]) : C(0);
    group.weigh(weight, dout, part, dv);
    group.weigh(weight * (dweight - delta[query]), q, part, dk);
  });
  part.store(dk, scale, Head<T>(p.dk, shape, part.head));
  part.store(dv, C(1), Head<T>(p.dv, shape, part.head));
}

template <typename Kernel, typename Params>
cudaError_t launch_parts(Kernel kernel, const Params& params, cudaStream_t stream) {
  const AttentionShape& shape = params.shape;
  const dim3 grid(shape.batch * shape.heads * blocks_of(shape.grid), (shape.channels + kPiece - 1) / kPiece);
  return launch(kernel, grid, kThreads, 0, stream, params);
}

}  // namespace

cudaError_t launch_plain_forward(const SparseAttentionForward& params, cudaStream_t stream) {
  return with_format(params.shape.format,
                     [&](auto element) { return launch_parts(forward_kernel<decltype(element)>, params, stream); });
}

cudaError_t launch_plain_dq(const SparseAttentionBackward& params, cudaStream_t stream) {
  return with_format(params.shape.format,
                     [&](auto element) { return launch_parts(dq_kernel<decltype(element)>, params, stream); });
}

cudaError_t launch_plain_dkv(const SparseAttentionBackward& params, cudaStream_t stream) {
  return with_format(params.shape.format,
                     [&](auto element) { return launch_parts(dkv_kernel<decltype(element)>, params, stream); });
}

}  // namespace dalle_fast::attention
