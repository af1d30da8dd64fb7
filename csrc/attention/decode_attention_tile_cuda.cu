// Decode attention of 16-bit tensors on tensor cores. A block of threads owns a head of up to 32 candidates of one
// prompt.
//
// First the text, which they share: 128 keys at a time pass through shared memory; a warp multiplies a quarter of them
// with a strip of 16 candidates, the rows of its products. Then the images: a warp takes one candidate after the other,
// loads its window into registers and multiplies there. Text and window meet as outputs, sums and maxima of partial
// softmaxes, in a fixed order, so a result does not depend on the number of candidates. The text is read once for
// all candidates of a block, a window once; nothing is stored but the new token and the result.
//
// Few candidates do not fill the device: a prompt of H heads takes H blocks. Such a step is bound by reading the
// weights of the layer, far more than one prompt's text, so the text of a head is not split over blocks.
#include "attention/cuda_decode_attention.h"
#include "attention/cuda_tile.h"

namespace dalle_fast::attention {
namespace {

constexpr int kStrips = 2, kShares = 4;  // a warp has a strip of the candidates and a share of the text
constexpr int kWarps = kStrips * kShares, kBlockThreads = kWarps * kWarp;
constexpr int kCandidates = kStrips * kStripTokens;  // of a block of threads
constexpr int kStep = kShares * kBlockTokens;        // keys of the text
constexpr int kLoads = 8;  // rows of keys, and of values, that a lane requests before it uses the first

// Shared memory: a ring of slots for kStep keys and their values. Later in its place the partial results: for every
// warp and candidate of its strip, kChannels outputs, the sum and the maximum over its share of the text, with a pitch
// that keeps eight rows in different banks. At the end the slots of the window.
template <typename T, int kChannels>
struct Layout {
  using Rows = SharedRows<T, kChannels>;
  static constexpr int kSlots = kChannels <= 64 ? 2 : 1;
  static constexpr int kPitch = kChannels + 8;
  static constexpr size_t kRing = kSlots * 2 * kStep * kChannels * sizeof(T);
  static constexpr size_t kPartials = kWarps * kStripTokens * kPitch * sizeof(float);
  static constexpr size_t kWindow = kRing > kPartials ? kRing : kPartials;

  unsigned char* shared;

  DF_DEVICE Rows keys(int slot) const { return {reinterpret_cast<T*>(shared) + 2 * slot * kStep * kChannels}; }
  DF_DEVICE Rows values(int slot) const { return {keys(slot).data + kStep * kChannels}; }
  DF_DEVICE float* partial(int candidate, int share) const {
    const int warp = candidate / kStripTokens * kShares + share;
    return reinterpret_cast<float*>(shared) + (warp * kStripTokens + candidate % kStripTokens) * kPitch;
  }
  DF_DEVICE int* window() const { return reinterpret_cast<int*>(shared + kWindow); }
};

// A head of candidates first ... end - 1.
struct Owned {
  int prompt, head;
  int first, end;
};

// Blocks of threads for a head of one prompt.
DF_HOST_DEVICE inline int blocks_of(const DecodeAttention& p) {
  return (p.shape.batch / p.prompts + kCandidates - 1) / kCandidates;
}

DF_DEVICE Owned owned_by(const DecodeAttention& p, int block) {
  const int repeat = p.shape.batch / p.prompts, blocks = blocks_of(p);
  const int head = block / blocks, prompt = head / p.shape.heads;
  const int first = block % blocks * kCandidates;
  return {prompt, head % p.shape.heads, prompt * repeat + first, prompt * repeat + min(first + kCandidates, repeat)};
}

template <typename T>
DF_DEVICE TokenRows<T> rows_of(const View& view, const AttentionShape& shape, int batch, int head) {
  return {view, shape, batch * shape.heads + head};
}

// Eight neighbouring channels.
template <typename T>
struct Eight {
  float x[8];

  DF_DEVICE explicit Eight(const uint4& bits) {
    const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack<T>(pairs[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
  DF_DEVICE float dot(const Eight& other) const {
    float sum = 0;
    for (int i = 0; i < 8; ++i) sum += x[i] * other.x[i];
    return sum;
  }
  DF_DEVICE uint4 bits(float scale) const {
    return make_uint4(pack<T>(x[0] * scale, x[1] * scale), pack<T>(x[2] * scale, x[3] * scale),
                      pack<T>(x[4] * scale, x[5] * scale), pack<T>(x[6] * scale, x[7] * scale));
  }
};

// Running softmax: the sum of weights, the maximum of scores, and the lane's eight channels of the output.
template <typename T>
struct Running {
  Eight<T> out;
  float total, maximum;

  DF_DEVICE void raise_maximum(float most) {
    const float correction = exp2_approximate(maximum - most);
    maximum = most;
    total *= correction;
    for (float& x : out.x) x *= correction;
  }
  DF_DEVICE void add(float weight, const float* value) {
    for (int d = 0; d < kChunkChannels; ++d) out.x[d] += weight * value[d];
  }
};

// A strip of queries as the left side of products, straight from memory; those beyond the end are 0.
template <typename T, int kChannels>
DF_DEVICE void load_queries(const DecodeAttention& p, const Owned& owned, int first, uint32_t (&a)[kChannels / 16][4]) {
  const int lane = threadIdx.x % kWarp;
  for (int i = 0; i < 2; ++i) {
    const int candidate = first + lane / 4 + 8 * i;
    const T* row = rows_of<const T>(p.q, p.shape, min(candidate, owned.end - 1), owned.head).data;
    for (int d = 0; d < kChannels / 16; ++d) {
      for (int half = 0; half < 2; ++half) {
        const int channel = 16 * d + 8 * half + lane % 4 * 2;
        const bool inside = candidate < owned.end && channel < p.shape.channels;
        a[d][2 * half + i] = inside ? *reinterpret_cast<const uint32_t*>(row + channel) : 0;
      }
    }
  }
}

// Attention of the candidates to the text, left in the partial results. All threads of the block call it.
template <typename T, int kChannels>
DF_DEVICE void attend_to_text(const DecodeAttention& p, const Owned& owned, float to_log2,
                              const Layout<T, kChannels>& shared) {
  using L = Layout<T, kChannels>;
  const auto k = rows_of<const T>(p.text_k, p.shape, owned.prompt, owned.head);
  const auto v = rows_of<const T>(p.text_v, p.shape, owned.prompt, owned.head);
  const int text_len = p.shape.grid.text_len;
  const auto load = [&](int slot, int first) {
    constexpr int kChunks = kChannels / kChunkChannels, kRows = kBlockThreads / kChunks;  // rows at once
    static_assert(kStep % kRows == 0);
    const int chunk = threadIdx.x % kChunks;
    if (first < text_len) {
#pragma unroll
      for (int i = 0; i < kStep / kRows; ++i) {
        const int row = threadIdx.x / kChunks + i * kRows;
        const bool inside = first + row < text_len && chunk * kChunkChannels < p.shape.channels;
        const int64_t token = inside ? first + row : 0, channel = inside ? chunk * kChunkChannels : 0;
        copy_async<16>(shared.keys(slot).at(row, chunk), k.data + token * k.stride + channel, inside);
        copy_async<16>(shared.values(slot).at(row, chunk), v.data + token * v.stride + channel, inside);
      }
    }
    commit_copies();
  };
  for (int slot = 0; slot < L::kSlots; ++slot) load(slot, slot * kStep);

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int strip = warp / kShares * kStripTokens, share = warp % kShares;  // the first candidate of the strip
  const bool idle = owned.first + strip >= owned.end;
  uint32_t queries[kChannels / 16][4];
  load_queries<T, kChannels>(p, owned, owned.first + strip, queries);
  StripSoftmax softmax;
  float out[kChannels / 8][4] = {};
  int slot = 0;
  for (int first = 0; first < text_len; first += kStep) {
    wait_copies<L::kSlots - 1>();
    __syncthreads();  // the slot has arrived
    const int key = first + share * kBlockTokens;
    if (!idle && key < text_len) {
      const auto of_share = [&](const typename L::Rows& rows) {
        return typename L::Rows{rows.data + share * kBlockTokens * kChannels};
      };
      float scores[kBlockTokens / 8][4];
      of_share(shared.keys(slot)).score(queries, scores);
      for (int n = 0; n < kBlockTokens / 8; ++n) {
        for (int i = 0; i < 4; ++i) {
          const bool inside = key + StripMask::column_of(n, i) < text_len;
          scores[n][i] = inside ? scores[n][i] * to_log2 : -INFINITY;
        }
      }
      softmax.add(scores, out);
      of_share(shared.values(slot)).weigh(scores, out);
    }
    __syncthreads();  // and all threads have read it
    load(slot, first + L::kSlots * kStep);
    slot = (slot + 1) % L::kSlots;
  }

  softmax.finish();
  for (int i = 0; i < 2; ++i) {
    float* row = shared.partial(strip + lane / 4 + 8 * i, share);
    for (int n = 0; n < kChannels / 8; ++n) {
      *reinterpret_cast<float2*>(row + 8 * n + lane % 4 * 2) = make_float2(out[n][2 * i], out[n][2 * i + 1]);
    }
    if (lane % 4 == 0) *reinterpret_cast<float2*>(row + kChannels) = make_float2(softmax.sum[i], softmax.maximum[i]);
  }
  __syncthreads();
}

// Stores the new token of one candidate and attends to it, to the `seen` tokens of its window and, by way of the
// partial results, to the text. A group of kChunks lanes has the channels of a row, eight each; the groups have
// different rows.
template <typename T, int kChannels>
DF_DEVICE void attend_to_image(const DecodeAttention& p, const Owned& owned, int candidate, int new_slot, int seen,
                               float to_log2, const Layout<T, kChannels>& shared) {
  constexpr int kChunks = kChannels / kChunkChannels, kGroups = kWarp / kChunks;
  const int lane = threadIdx.x % kWarp, chunk = lane % kChunks, group = lane / kChunks;
  const bool inside = chunk * kChunkChannels < p.shape.channels;
  const int channel = inside ? chunk * kChunkChannels : 0;
  const auto row_of = [&](const View& view) { return rows_of<T>(view, p.shape, candidate, owned.head).data + channel; };
  const auto load = [](const T* row, bool wanted) {
    return wanted ? *reinterpret_cast<const uint4*>(row) : make_uint4(0, 0, 0, 0);
  };
  const Eight<T> query(load(row_of(p.q), inside));
  const auto score_of = [&](const uint4& key) {
    float score = query.dot(Eight<T>(key));
    for (int lanes = 1; lanes < kChunks; lanes *= 2) score += __shfl_xor_sync(kAllLanes, score, lanes);
    return score * to_log2;
  };
  const auto sum_of_groups = [](float x) {
    for (int lanes = kChunks; lanes < kWarp; lanes *= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
    return x;
  };

  T* const cache_k = row_of(p.cache_k);
  T* const cache_v = row_of(p.cache_v);
  const uint4 new_k = load(row_of(p.k), inside), new_v = load(row_of(p.v), inside);
  const bool writes = group == 0 && inside;
  if (writes) {
    *reinterpret_cast<uint4*>(cache_k + new_slot * p.cache_k.token) = new_k;
    *reinterpret_cast<uint4*>(cache_v + new_slot * p.cache_v.token) = new_v;
  }

  // The new token counts in the first group.
  Running<T> softmax{Eight<T>(group == 0 ? new_v : make_uint4(0, 0, 0, 0)), group == 0 ? 1.0f : 0.0f, score_of(new_k)};
  const int* const window = shared.window();
  for (int first = 0; first < seen; first += kLoads * kGroups) {
    uint4 keys[kLoads], values[kLoads];
    for (int i = 0; i < kLoads; ++i) {
      const int n = first + i * kGroups + group;
      const int64_t slot = n < seen ? window[n] : 0;
      keys[i] = load(cache_k + slot * p.cache_k.token, inside && n < seen);
      values[i] = load(cache_v + slot * p.cache_v.token, inside && n < seen);
    }
    float scores[kLoads], most = softmax.maximum;
    for (int i = 0; i < kLoads; ++i) {
      const float score = score_of(keys[i]);
      scores[i] = first + i * kGroups + group < seen ? score : -INFINITY;
      most = fmaxf(most, scores[i]);
    }
    for (int lanes = kChunks; lanes < kWarp; lanes *= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, lanes));
    softmax.raise_maximum(most);
    for (int i = 0; i < kLoads; ++i) {
      const float weight = exp2_approximate(scores[i] - most);
      softmax.total += weight;
      softmax.add(weight, Eight<T>(values[i]).x);
    }
  }
  softmax.total = sum_of_groups(softmax.total);
  for (float& x : softmax.out.x) x = sum_of_groups(x);

  const float* text[kShares];
  float most = softmax.maximum;
  for (int share = 0; share < kShares; ++share) {
    text[share] = shared.partial(candidate - owned.first, share);
    most = fmaxf(most, text[share][kChannels + 1]);
  }
  softmax.raise_maximum(most);
  for (const float* part : text) {
    const float weight = exp2_approximate(part[kChannels + 1] - most);
    softmax.total += weight * part[kChannels];
    softmax.add(weight, part + chunk * kChunkChannels);
  }
  if (writes) *reinterpret_cast<uint4*>(row_of(p.out)) = softmax.out.bits(1.0f / softmax.total);
}

// Lists the slots of the tokens that `query` sees, its own last. All threads of the block call it.
template <typename Mask>
DF_DEVICE void list_window(const Mask& mask, int query, int* slots) {
  for (int i = 0; i < mask.runs(); ++i) {
    const KeyRange run = mask.run(query, i);
    for (int key = run.begin + threadIdx.x; key < run.end; key += kBlockThreads) {
      slots[key - run.begin] = mask.cache_slot(key);
    }
    slots += run.end - run.begin;
  }
}

template <typename T, int kChannels>
__global__ void __launch_bounds__(kBlockThreads, kChannels <= 64 ? 2 : 1) tile_kernel(DecodeAttention p) {
  DF_SHARED(bytes);
  const Layout<T, kChannels> shared{bytes};
  const AttentionShape& shape = p.shape;
  const Owned owned = owned_by(p, blockIdx.x);

  const int64_t position = *p.position;
  if (!is_inside(position, shape.grid)) {  // must not move an address: NaN, and the caches stay as they are
    for (int candidate = owned.first; candidate < owned.end; ++candidate) {
      T* out = rows_of<T>(p.out, shape, candidate, owned.head).data;
      for (int d = threadIdx.x; d < shape.channels; d += kBlockThreads) out[d] = narrow<T>(NAN);
    }
    return;
  }

  int* const window = shared.window();
  const int tokens = with_mask(shape.kind, shape.grid, [&](const auto& mask) {
    const int query = mask.position(static_cast<int>(position));
    list_window(mask, query, window);
    return window_of(mask, query);
  });
  const float to_log2 = static_cast<float>(shape.scale) * kLog2E;
  attend_to_text(p, owned, to_log2, shared);
  for (int candidate = owned.first + threadIdx.x / kWarp; candidate < owned.end; candidate += kWarps) {
    attend_to_image(p, owned, candidate, window[tokens - 1], tokens - 1, to_log2, shared);
  }
}

}  // namespace

cudaError_t launch_tile_decode(const DecodeAttention& params, int window, cudaStream_t stream) {
  return with_tile_kernel(params.shape, [&](auto element, auto channels) {
    using T = decltype(element);
    constexpr int kChannels = decltype(channels)::value;
    const int blocks = params.prompts * params.shape.heads * blocks_of(params);
    const size_t bytes = Layout<T, kChannels>::kWindow + window * sizeof(int);
    return launch(tile_kernel<T, kChannels>, blocks, kBlockThreads, bytes, stream, params);
  });
}

}  // namespace dalle_fast::attention
