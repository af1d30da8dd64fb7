// The products of cuda_product.h for 16 bits (S: BFloat16, Half), on tensor cores. The codebook and dz go in as they
// are; weights and y, computed in float32, as the sum of two numbers of S. So nothing but the result is rounded.
#pragma once

#include "cuda/mma.h"
#include "gumbel/cuda_product.h"

namespace dalle_fast::gumbel {

// A row and eight elements more: the eight rows that one instruction reads lie in different banks.
constexpr int kPixelPitch = kTilePixels + 8;

// One of the four blocks that a lane addresses for load_blocks, and its row there.
struct BlockRow {
  int block = lane_index() / 8, row = lane_index() % 8;
};

// Scale factor of the numbers in a SplitTile. Below 2^-14 float16 has fewer and fewer bits, and most of 8192 codes have
// weights as small as that.
template <typename S>
constexpr float kSplitScale = std::is_same_v<S, Half> ? 0x1p15f : 1.0f;

// [kTileCodes, kTilePixels], from 0 to 1, as two numbers of S each.
template <typename S>
struct SplitTile {
  S *high, *low;

  static constexpr int kElements = 2 * kTileCodes * kPixelPitch;

  DF_DEVICE explicit SplitTile(S* shared) : high(shared), low(shared + kTileCodes * kPixelPitch) {}

  DF_DEVICE void set(int code, int quad, const Quad<float>& x) const {
    Quad<S> first, rest;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const float scaled = x.at[i] * kSplitScale<S>;
      first.at[i] = narrow<S>(scaled);
      rest.at[i] = narrow<S>(scaled - widen(first.at[i]));
    }
    reinterpret_cast<Quad<S>*>(high + code * kPixelPitch)[quad] = first;
    reinterpret_cast<Quad<S>*>(low + code * kPixelPitch)[quad] = rest;
  }
};

// Copies rows of the codebook from first_code on, 0 beyond the last code or channel, to rows `pitch` apart; 16 bytes at
// a time where rows are aligned to that.
template <int block_channels, int pitch, typename S>
DF_DEVICE void copy_codebook_rows(const S* codebook, int codes, int64_t channels, int first_code, int64_t first_channel,
                                  S* to) {
  constexpr int kAtOnce = 16 / sizeof(S), kParts = block_channels / kAtOnce;
  static_assert(pitch % kAtOnce == 0 && kProductThreads % kParts == 0);
  if (channels % kAtOnce != 0 || reinterpret_cast<uintptr_t>(codebook) % 16 != 0) {
    for_each_codebook_element<block_channels>(codebook, codes, channels, first_code, first_channel,
                                              [&](int code, int channel, S x) { to[code * pitch + channel] = x; });
    return;
  }
  using Part = ChannelVector<S, kAtOnce>;
  const int channel = threadIdx.x % kParts * kAtOnce;
  const S* const from = codebook + first_code * channels + first_channel + channel;
#pragma unroll
  for (int row = threadIdx.x / kParts; row < kTileCodes; row += kProductThreads / kParts) {
    const bool inside = first_code + row < codes && first_channel + channel < channels;
    *reinterpret_cast<Part*>(to + row * pitch + channel) =
        inside ? *reinterpret_cast<const Part*>(from + row * channels) : Part{};
  }
}

template <typename S>
class ForwardProduct<S, true> {
 public:
  static constexpr int kChannels = 128;
  static constexpr int kChannelPitch = kChannels + 8;
  static constexpr size_t kSharedBytes =
      sizeof(float) * kTileCodes * kCodePitch + sizeof(S) * (SplitTile<S>::kElements + kTileCodes * kChannelPitch);

  DF_DEVICE explicit ForwardProduct(unsigned char* shared)
      : noisy_(reinterpret_cast<float*>(shared)),
        weights_(reinterpret_cast<S*>(noisy_ + kTileCodes * kCodePitch)),
        codebook_(weights_.high + SplitTile<S>::kElements) {}

  DF_DEVICE Quad<float>& noisy(int code, int quad) const {
    return reinterpret_cast<Quad<float>*>(noisy_ + code * kCodePitch)[quad];
  }
  DF_DEVICE void set_weight(int code, int quad, const Quad<float>& weight) const { weights_.set(code, quad, weight); }

  DF_DEVICE void load_codebook(const S* codebook, int codes, int64_t channels, int first_code, int64_t first_channel) {
    copy_codebook_rows<kChannels, kChannelPitch>(codebook, codes, channels, first_code, first_channel, codebook_);
  }

  DF_DEVICE void rescale(const float* factor) {
    const float top = factor[pixel()], bottom = factor[pixel() + 8];
#pragma unroll
    for (auto& z : z_) z[0] *= top, z[1] *= top, z[2] *= bottom, z[3] *= bottom;
  }

  DF_DEVICE void add() {
    const BlockRow at;
#pragma unroll
    for (int code = 0; code < kTileCodes; code += 16) {
      const int weights_at = (code + at.block / 2 * 8 + at.row) * kPixelPitch + first_pixel() + at.block % 2 * 8;
      uint32_t high[4], low[4];
      load_blocks_transposed(high, weights_.high + weights_at);
      load_blocks_transposed(low, weights_.low + weights_at);
#pragma unroll
      for (int n = 0; n < kOwnBlocks; n += 2) {
        uint32_t w[4];
        load_blocks_transposed(w, codebook_ + (code + at.block % 2 * 8 + at.row) * kChannelPitch + first_channel() +
                                      n * 8 + at.block / 2 * 8);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma<S>(z_[n + i], high, w[2 * i], w[2 * i + 1]);
          mma<S>(z_[n + i], low, w[2 * i], w[2 * i + 1]);
        }
      }
    }
  }

  template <typename Body>
  DF_DEVICE void for_each(const Body& body) const {
#pragma unroll
    for (int n = 0; n < kOwnBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        body(pixel() + i / 2 * 8, first_channel() + n * 8 + lane_index() % 4 * 2 + i % 2, z_[n][i] / kSplitScale<S>);
      }
    }
  }

 private:
  // A warp has 16 pixels and half of the channels.
  static constexpr int kOwnBlocks = kChannels / 2 / 8;
  static DF_DEVICE int first_pixel() { return threadIdx.x / kWarp % 4 * 16; }
  static DF_DEVICE int first_channel() { return threadIdx.x / kWarp / 4 * (kChannels / 2); }
  static DF_DEVICE int pixel() { return first_pixel() + lane_index() / 4; }

  float* noisy_;  // [kTileCodes][kCodePitch]
  SplitTile<S> weights_;
  S* codebook_;  // [kTileCodes][kChannelPitch]
  float z_[kOwnBlocks][4] = {};
};

template <typename S>
class BackwardProduct<S, true> {
 public:
  static constexpr int kChannels = 128;
  static constexpr int kChannelPitch = kChannels + 8;
  static constexpr size_t kSharedBytes =
      sizeof(float) * kTileCodes * kCodePitch +
      sizeof(S) * (SplitTile<S>::kElements + kTileCodes * kChannelPitch + kChannels * kPixelPitch);

  DF_DEVICE BackwardProduct(unsigned char* shared, const TilePlace& place)
      : place_(place),
        dy_(reinterpret_cast<float*>(shared)),
        y_(reinterpret_cast<S*>(dy_ + kTileCodes * kCodePitch)),
        codebook_(y_.high + SplitTile<S>::kElements),
        dz_(codebook_ + kTileCodes * kChannelPitch) {}

  DF_DEVICE void load_codebook(const S* codebook, int codes, int64_t channels, int first_code, int64_t first_channel) {
    copy_codebook_rows<kChannels, kChannelPitch>(codebook, codes, channels, first_code, first_channel, codebook_);
  }

  DF_DEVICE void set_dz(int channel, int quad, const Quad<float>& dz) {
    Quad<S> bits;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) bits.at[i] = narrow<S>(dz.at[i]);
    reinterpret_cast<Quad<S>*>(dz_ + channel * kPixelPitch)[quad] = bits;
  }

  DF_DEVICE void clear_dy() {
#pragma unroll
    for (auto& block : dy_own_) block[0] = block[1] = block[2] = block[3] = 0;
  }

  DF_DEVICE void add_dy() {
    const BlockRow at;
#pragma unroll 4
    for (int channel = 0; channel < kChannels; channel += 16) {
      uint32_t w[4];
      load_blocks(w,
                  codebook_ + (first_code() + at.block % 2 * 8 + at.row) * kChannelPitch + channel + at.block / 2 * 8);
#pragma unroll
      for (int n = 0; n < kDyBlocks; n += 2) {
        uint32_t dz[4];
        load_blocks_transposed(
            dz, dz_ + (channel + at.block % 2 * 8 + at.row) * kPixelPitch + first_pixel() + n * 8 + at.block / 2 * 8);
        mma<S>(dy_own_[n], w, dz[0], dz[1]);
        mma<S>(dy_own_[n + 1], w, dz[2], dz[3]);
      }
    }
  }

  DF_DEVICE void share_dy() {
#pragma unroll
    for (int n = 0; n < kDyBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dy_[(code() + i / 2 * 8) * kCodePitch + first_pixel() + n * 8 + lane_index() % 4 * 2 + i % 2] = dy_own_[n][i];
      }
    }
    __syncthreads();
  }
  DF_DEVICE Quad<float> dy(int c) const {
    return reinterpret_cast<const Quad<float>*>(dy_ + (place_.slice + c * kTileSlices) * kCodePitch)[place_.quad];
  }

  DF_DEVICE void set_y(int code, int quad, const Quad<float>& y) { y_.set(code, quad, y); }

  DF_DEVICE void add_gradient() {
    const BlockRow at;
#pragma unroll
    for (int pixel = 0; pixel < kTilePixels; pixel += 16) {
      const int y_at = (first_code() + at.block % 2 * 8 + at.row) * kPixelPitch + pixel + at.block / 2 * 8;
      uint32_t high[4], low[4];
      load_blocks(high, y_.high + y_at);
      load_blocks(low, y_.low + y_at);
#pragma unroll
      for (int n = 0; n < kOwnBlocks; n += 2) {
        uint32_t dz[4];
        load_blocks(
            dz, dz_ + (first_channel() + n * 8 + at.block / 2 * 8 + at.row) * kPixelPitch + pixel + at.block % 2 * 8);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma<S>(gradient_[n + i], high, dz[2 * i], dz[2 * i + 1]);
          mma<S>(gradient_[n + i], low, dz[2 * i], dz[2 * i + 1]);
        }
      }
    }
  }

  template <typename Body>
  DF_DEVICE void for_each(const Body& body) const {
#pragma unroll
    for (int n = 0; n < kOwnBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        body(code() + i / 2 * 8, first_channel() + n * 8 + lane_index() % 4 * 2 + i % 2,
             gradient_[n][i] / kSplitScale<S>);
      }
    }
  }

 private:
  // A warp has 16 codes, with half of the pixels in dy and half of the channels in the gradient.
  static constexpr int kDyBlocks = kTilePixels / 2 / 8, kOwnBlocks = kChannels / 2 / 8;
  static DF_DEVICE int first_code() { return threadIdx.x / kWarp % 4 * 16; }
  static DF_DEVICE int first_pixel() { return threadIdx.x / kWarp / 4 * (kTilePixels / 2); }
  static DF_DEVICE int first_channel() { return threadIdx.x / kWarp / 4 * (kChannels / 2); }
  static DF_DEVICE int code() { return first_code() + lane_index() / 4; }

  TilePlace place_;
  float* dy_;  // [kTileCodes][kCodePitch]
  SplitTile<S> y_;
  S* codebook_;  // [kTileCodes][kChannelPitch]
  S* dz_;        // [kChannels][kPixelPitch]
  float dy_own_[kDyBlocks][4] = {};
  float gradient_[kOwnBlocks][4] = {};
};

}  // namespace dalle_fast::gumbel
