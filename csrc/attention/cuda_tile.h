// Tiles of attention on tensor cores.
//
// A block of threads owns a tile of 64 tokens of one head, queries or keys, a strip of 16 for each of its 4 warps. It
// meets the other side in blocks of 32 tokens, whose rows of two tensors pass through a ring in shared memory: while
// one block is multiplied, the next ones arrive. Tiles and blocks are text or image, never both, and a warp skips a
// block of which its strip sees nothing.
//
// A row in shared memory is kChannels wide; channels beyond the tensor's are 0. Chunks of 16 bytes are permuted by the
// index of the row, so that the eight rows of one load_blocks lie in different banks.
#pragma once

#include "attention/cuda_stream_mask.h"
#include "attention/cuda_strip.h"
#include "attention/params.h"
#include "cuda/device.h"
#include "cuda/mma.h"

namespace dalle_fast::attention {

constexpr int kTileWarps = 4, kTileTokens = kTileWarps * kStripTokens;
constexpr int kTileThreads = kTileWarps * 32;
constexpr int kRingSlots = 3;
constexpr int kChunkChannels = 8;  // that a thread copies at once, 16 bytes

// Tokens first ... end - 1 of a head.
struct TokenTile {
  int head;  // b H + h
  int first, end;
  bool text;
};

DF_HOST_DEVICE inline int token_tiles(int tokens) { return (tokens + kTileTokens - 1) / kTileTokens; }

// Tile `index` of the text or the image.
DF_DEVICE TokenTile tile_of(const Grid& grid, int head, int index, bool text) {
  const int begin = text ? 0 : grid.text_len, end = text ? grid.text_len : grid.seq_len();
  const int first = begin + index * kTileTokens;
  return {head, first, min(first + kTileTokens, end), text};
}

// Number of tiles of queries: one block of threads each, those of a head with the most keys first.
inline int query_tiles(const AttentionShape& shape) {
  return shape.batch * shape.heads * (token_tiles(shape.grid.text_len) + token_tiles(shape.grid.image_len()));
}

DF_DEVICE TokenTile query_tile(const Grid& grid, int block) {
  const int text_tiles = token_tiles(grid.text_len), tiles = text_tiles + token_tiles(grid.image_len());
  const int index = tiles - 1 - block % tiles;
  const bool text = index < text_tiles;
  return tile_of(grid, block / tiles, text ? index : index - text_tiles, text);
}

// Iterates over the blocks that a tile of queries (or keys) attends to (or is attended by), text blocks first.
template <bool kQueries>
class VisibleBlocks {
 public:
  DF_DEVICE VisibleBlocks(const StreamMask& mask, const TokenTile& tile) : mask_(mask), tile_(tile) {
    const Grid& grid = mask.grid;
    if (kQueries) {
      text_ = {0, min(tile.end, grid.text_len)};
      if (!tile.text) image_ = mask.keys_of(tile.first, tile.end - 1);
    } else if (tile.text) {
      text_ = {tile.first, grid.text_len};
      image_ = {grid.text_len, grid.seq_len()};
    } else {
      image_ = mask.queries_of(tile.first, tile.end - 1);
    }
  }

  // The first token of the next block, or -1.
  DF_DEVICE int next() {
    if (text_.begin < text_.end) return take(text_);
    while (image_.begin < image_.end) {
      const int first = take(image_), last = min(first + kBlockTokens, image_.end) - 1, last_owned = tile_.end - 1;
      if (tile_.text) return first;
      if (kQueries ? mask_.meet(tile_.first, last_owned, first, last)
                   : mask_.meet(first, last, tile_.first, last_owned)) {
        return first;
      }
    }
    return -1;
  }

  // A block has no token from here on.
  DF_DEVICE int end(int first) const { return mask_.is_text(first) ? text_.end : image_.end; }

 private:
  DF_DEVICE static int take(KeyRange& rest) {
    const int first = rest.begin;
    rest.begin += kBlockTokens;
    return first;
  }

  const StreamMask& mask_;
  const TokenTile& tile_;
  KeyRange text_ = {0, 0}, image_ = {0, 0};
};

// One head of a tensor in global memory; its channels lie side by side, its rows are aligned to 16 bytes.
template <typename T>
struct TokenRows {
  T* data;
  int64_t stride;  // elements from token to token
  int channels;

  DF_DEVICE TokenRows(const View& view, const AttentionShape& shape, int head)
      : data(static_cast<T*>(view.data) + head / shape.heads * view.batch + head % shape.heads * view.head),
        stride(view.token),
        channels(shape.channels) {}
};

// Rows in shared memory.
template <typename T, int kChannels>
struct SharedRows {
  static constexpr int kChunks = kChannels / kChunkChannels;
  static_assert(kChunks == 4 || kChunks % 8 == 0);

  T* data;

  DF_DEVICE T* at(int row, int chunk) const {
    const int permutation = kChunks == 4 ? row >> 1 & 3 : row & 7;
    return data + (row * kChunks + (chunk ^ permutation)) * kChunkChannels;
  }

  // Starts the load of kRows tokens from `first` on; those from `end` on become 0.
  template <int kRows>
  DF_DEVICE void load(const TokenRows<const T>& from, const StreamMask& mask, int first, int end) const {
    for_each_chunk<kRows>(from, mask, first, end,
                          [&](int row, int chunk, int token, bool inside) { copy(row, chunk, from, token, inside); });
  }

  // The same for two tensors of the same tokens, the second into `other`.
  template <int kRows>
  DF_DEVICE void load(const TokenRows<const T>& a, const SharedRows& other, const TokenRows<const T>& b,
                      const StreamMask& mask, int first, int end) const {
    for_each_chunk<kRows>(a, mask, first, end, [&](int row, int chunk, int token, bool inside) {
      copy(row, chunk, a, token, inside);
      other.copy(row, chunk, b, token, inside);
    });
  }

  // kStripTokens rows from `row` on, 16 channels or all of them, as the left side of products.
  DF_DEVICE void strip(int row, int d, uint32_t (&a)[4]) const {
    const int lane = threadIdx.x % 32;
    load_blocks(a, at(row + lane % 16, 2 * d + lane / 16));
  }
  DF_DEVICE void strip(int row, uint32_t (&a)[kChannels / 16][4]) const {
    for (int d = 0; d < kChannels / 16; ++d) strip(row, d, a[d]);
  }

  // c = a . rows^T, for kBlockTokens rows
  DF_DEVICE void score(const uint32_t (&a)[kChannels / 16][4], float (&c)[kBlockTokens / 8][4]) const {
    clear(c);
    for (int d = 0; d < kChannels / 16; ++d) score(d, a[d], c);
  }

  // The same with a strip of `from`, which starts at `row`.
  DF_DEVICE void score(const SharedRows& from, int row, float (&c)[kBlockTokens / 8][4]) const {
    clear(c);
#pragma unroll 1  // or all of the strip would be in registers, after all
    for (int d = 0; d < kChannels / 16; ++d) {
      uint32_t a[4];
      from.strip(row, d, a);
      score(d, a, c);
    }
  }

  // c += weights . rows, for kBlockTokens rows; the weights are rounded to T.
  DF_DEVICE void weigh(const float (&weights)[kBlockTokens / 8][4], float (&c)[kChannels / 8][4]) const {
    const int lane = threadIdx.x % 32;
    for (int k = 0; k < kBlockTokens / 16; ++k) {
      const float (&left)[4] = weights[2 * k], (&right)[4] = weights[2 * k + 1];
      const uint32_t a[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]),
                             pack<T>(right[2], right[3])};
      for (int d = 0; d < kChannels / 16; ++d) {
        uint32_t b[4];
        load_blocks_transposed(b, at(16 * k + lane % 16, 2 * d + lane / 16));
        mma<T>(c[2 * d], a, b[0], b[1]);
        mma<T>(c[2 * d + 1], a, b[2], b[3]);
      }
    }
  }

  // Writes a strip by way of shared memory, whose rows from `row` on the warp may overwrite.
  DF_DEVICE void store(int row, const float (&c)[kChannels / 8][4], const float (&scale)[2], const TokenRows<T>& to,
                       const StreamMask& mask, int first, int end) const {
    const int lane = threadIdx.x % 32;
    for (int n = 0; n < kChannels / 8; ++n) {
      for (int i = 0; i < 2; ++i) {
        const uint32_t pair = pack<T>(c[n][2 * i] * scale[i], c[n][2 * i + 1] * scale[i]);
        reinterpret_cast<uint32_t*>(at(row + lane / 4 + 8 * i, n))[lane % 4] = pair;
      }
    }
    __syncwarp();
    const int chunk = lane % kChunks;
    if (chunk * kChunkChannels >= to.channels) return;
    for (int i = lane / kChunks; i < min(kStripTokens, end - first); i += 32 / kChunks) {
      T* out = to.data + mask.token(first + i) * to.stride + chunk * kChunkChannels;
      *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(at(row + i, chunk));
    }
  }

 private:
  // Calls f(row, chunk, token, whether it exists) for the chunks that the thread copies.
  template <int kRows, typename F>
  DF_DEVICE static void for_each_chunk(const TokenRows<const T>& from, const StreamMask& mask, int first, int end,
                                       const F& f) {
    constexpr int kStep = kTileThreads / kChunks;
    static_assert(kRows % kStep == 0);
    const int chunk = threadIdx.x % kChunks;
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) {
      const int row = threadIdx.x / kChunks + i * kStep;
      const bool inside = first + row < end && chunk * kChunkChannels < from.channels;
      f(row, chunk, inside ? mask.token(first + row) : 0, inside);
    }
  }

  DF_DEVICE void copy(int row, int chunk, const TokenRows<const T>& from, int token, bool inside) const {
    copy_async<16>(at(row, chunk), from.data + (inside ? token * from.stride + chunk * kChunkChannels : 0), inside);
  }

  DF_DEVICE static void clear(float (&c)[kBlockTokens / 8][4]) {
    for (int n = 0; n < kBlockTokens / 8; ++n) {
      for (float& x : c[n]) x = 0;
    }
  }

  // c += a . rows^T, for 16 channels
  DF_DEVICE void score(int d, const uint32_t (&a)[4], float (&c)[kBlockTokens / 8][4]) const {
    const int lane = threadIdx.x % 32;
    for (int n = 0; n < kBlockTokens / 8; n += 2) {
      uint32_t b[4];
      load_blocks(b, at(8 * n + lane / 16 * 8 + lane % 8, 2 * d + lane / 8 % 2));
      mma<T>(c[n], a, b[0], b[1]);
      mma<T>(c[n + 1], a, b[2], b[3]);
    }
  }
};

// Shared memory: kRingSlots slots, each for a tile of one tensor or for a block of two.
template <typename T, int kChannels>
struct TileRing {
  using Rows = SharedRows<T, kChannels>;
  static constexpr size_t kTileBytes = kTileTokens * kChannels * sizeof(T), kBytes = kRingSlots * kTileBytes;
  static_assert(kTileTokens == 2 * kBlockTokens);

  T* data;

  DF_DEVICE Rows tile(int slot) const { return {data + slot * kTileTokens * kChannels}; }
  DF_DEVICE Rows first(int slot) const { return tile(slot); }
  DF_DEVICE Rows second(int slot) const { return {data + (slot * kTileTokens + kBlockTokens) * kChannels}; }

  // Starts the load of a block of two tensors, whose tokens end at `end`.
  DF_DEVICE void load(int slot, const TokenRows<const T>& a, const TokenRows<const T>& b, const StreamMask& mask,
                      int block, int end) const {
    first(slot).template load<kBlockTokens>(a, second(slot), b, mask, block, end);
  }
};

// Passes blocks through the ring, kRingSlots - 1 of them ahead of the one in use. `load(slot)` starts the copies of
// the next block and returns its first token, or -1 after the last. All threads of the block take every step.
template <typename Load>
class RingPipeline {
 public:
  DF_DEVICE explicit RingPipeline(const Load& load) : load_(load) {
#pragma unroll 1  // one copy of the code
    for (int slot = 0; slot < kRingSlots - 1; ++slot) load_next(slot);
  }

  // Calls use(block, slot) for one block after the other; then the ring is free.
  template <typename Use>
  DF_DEVICE void run(const Use& use) {
    for (int slot = 0; pending_[0] >= 0; slot = (slot + 1) % kRingSlots) {
      const int block = pending_[0];
      wait_copies<kRingSlots - 2>();
      __syncthreads();  // the block has arrived, and no thread reads the one before it
      load_next((slot + kRingSlots - 1) % kRingSlots);
      use(block, slot);
    }
    __syncthreads();
  }

 private:
  DF_DEVICE void load_next(int slot) {
#pragma unroll
    for (int i = 0; i < kRingSlots - 2; ++i) pending_[i] = pending_[i + 1];
    pending_[kRingSlots - 2] = load_(slot);
    commit_copies();
  }

  const Load& load_;
  int pending_[kRingSlots - 1] = {};  // first tokens of the blocks under way, the next block first
};

// Calls f(T(), integral_constant kChannels) for the instance of a kernel that takes the shape.
template <typename F>
cudaError_t with_tile_kernel(const AttentionShape& shape, const F& f) {
  const auto with_channels = [&](auto element) {
    if (shape.channels <= 32) return f(element, std::integral_constant<int, 32>());
    if (shape.channels <= 64) return f(element, std::integral_constant<int, 64>());
    return f(element, std::integral_constant<int, 128>());
  };
  return with_format(shape.format, [&](auto element) {
    if constexpr (sizeof(element) == 2) {
      return with_channels(element);
    } else {
      return cudaErrorInvalidValue;  // which on_tensor_cores() rules out
    }
  });
}

}  // namespace dalle_fast::attention
