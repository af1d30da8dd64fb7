// The products of a tile with the codebook on the FP32 (or FP64) units: a warp owns kWarpRows rows of the result, and a
// lane some of the block's channels. cuda_product_mma.h has the same two classes for 16 bits.
#pragma once

#include "gumbel/cuda_tile.h"

namespace dalle_fast::gumbel {

// z [kTilePixels, kChannels], the product of the weights and the codebook.
template <typename S, bool tensor_cores = sizeof(S) == 2>
class ForwardProduct {
 public:
  using T = Arithmetic<S>;
  static constexpr int kChannels = sizeof(T) == 4 ? 128 : 64;
  static constexpr size_t kSharedBytes = sizeof(T) * kTileCodes * (kCodePitch + kChannels);

  DF_DEVICE explicit ForwardProduct(unsigned char* shared)
      : weights_(reinterpret_cast<T*>(shared)), codebook_(weights_ + kTileCodes * kCodePitch) {}

  // Place of a quad's noisy logits until the reference is known; the weights may take it over.
  DF_DEVICE Quad<T>& noisy(int code, int quad) const {
    return reinterpret_cast<Quad<T>*>(weights_ + code * kCodePitch)[quad];
  }
  DF_DEVICE void set_weight(int code, int quad, const Quad<T>& weight) const { noisy(code, quad) = weight; }

  // Rows of the codebook from first_code on, 0 beyond the last code or channel.
  DF_DEVICE void load_codebook(const S* codebook, int codes, int64_t channels, int first_code, int64_t first_channel) {
    for_each_codebook_element<kChannels>(
        codebook, codes, channels, first_code, first_channel,
        [&](int code, int channel, S x) { codebook_[code * kChannels + channel] = widen(x); });
  }

  // z *= factor of the pixel
  DF_DEVICE void rescale(const T* factor) {
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const T scale = factor[first_row_of_warp() + r];
#pragma unroll
      for (int c = 0; c < kCount; ++c) z_[r].at[c] *= scale;
    }
  }

  DF_DEVICE void add() {
#pragma unroll 4
    for (int code = 0; code < kTileCodes; ++code) {
      const Own w = reinterpret_cast<const Own*>(codebook_ + code * kChannels)[lane_index()];
      const auto* weights = reinterpret_cast<const Quad<T>*>(weights_ + code * kCodePitch + first_row_of_warp());
#pragma unroll
      for (int r = 0; r < kWarpRows; r += kQuad) {
        const Quad<T> y = weights[r / kQuad];
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
#pragma unroll
          for (int c = 0; c < kCount; ++c) z_[r + i].at[c] += y.at[i] * w.at[c];
        }
      }
    }
  }

  // Calls body(pixel, channel, z) for the elements that the thread holds.
  template <typename Body>
  DF_DEVICE void for_each(const Body& body) const {
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) body(first_row_of_warp() + r, lane_index() * kCount + c, z_[r].at[c]);
    }
  }

 private:
  static constexpr int kCount = kChannels / kWarp;
  using Own = ChannelVector<T, kCount>;

  T* weights_;   // [kTileCodes][kCodePitch]
  T* codebook_;  // [kTileCodes][kChannels]
  Own z_[kWarpRows] = {};
};

// dy [kTileCodes, kTilePixels] = codebook dz, and the codebook's gradient [kTileCodes, kChannels] += y dz.
template <typename S, bool tensor_cores = sizeof(S) == 2>
class BackwardProduct {
 public:
  using T = Arithmetic<S>;
  static constexpr int kChannels = ForwardProduct<S>::kChannels;
  static constexpr size_t kSharedBytes = sizeof(T) * (kTileCodes * kCodePitch + (kTileCodes + kTilePixels) * kChannels);

  DF_DEVICE BackwardProduct(unsigned char* shared, const TilePlace& place)
      : place_(place),
        y_(reinterpret_cast<T*>(shared)),
        codebook_(y_ + kTileCodes * kCodePitch),
        dz_(codebook_ + kTileCodes * kChannels) {}

  DF_DEVICE void load_codebook(const S* codebook, int codes, int64_t channels, int first_code, int64_t first_channel) {
    for_each_codebook_element<kChannels>(
        codebook, codes, channels, first_code, first_channel,
        [&](int code, int channel, S x) { *at(codebook_, code, code, channel) = widen(x); });
  }

  DF_DEVICE void set_dz(int channel, int quad, const Quad<T>& dz) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) *at(dz_, quad * kQuad + i, quad, channel) = dz.at[i];
  }

  DF_DEVICE void clear_dy() {
#pragma unroll
    for (int c = 0; c < kThreadCodes; ++c) dy_own_[c] = {};
  }

  DF_DEVICE void add_dy() {
    for (int channel = 0; channel < kChannels; channel += kQuad) {
      Quad<T> w[kThreadCodes];
#pragma unroll
      for (int c = 0; c < kThreadCodes; ++c) {
        const int code = place_.slice + c * kTileSlices;
        w[c] = *reinterpret_cast<const Quad<T>*>(at(codebook_, code, code, channel));
      }
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        const auto dz = *reinterpret_cast<const Quad<T>*>(at(dz_, place_.quad * kQuad + i, place_.quad, channel));
#pragma unroll
        for (int c = 0; c < kThreadCodes; ++c) {
#pragma unroll
          for (int j = 0; j < kQuad; ++j) dy_own_[c].at[i] += w[c].at[j] * dz.at[j];
        }
      }
    }
  }

  // Makes dy(c) available; all threads call it.
  DF_DEVICE void share_dy() {}
  // dy of the thread's code number c, at its quad.
  DF_DEVICE Quad<T> dy(int c) const { return dy_own_[c]; }

  DF_DEVICE void set_y(int code, int quad, const Quad<T>& y) {
    reinterpret_cast<Quad<T>*>(y_ + code * kCodePitch)[quad] = y;
  }

  DF_DEVICE void add_gradient() {
    for (int pixel = 0; pixel < kTilePixels; pixel += kQuad) {
      Own dz[kQuad];
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        dz[i] = *reinterpret_cast<const Own*>(at(dz_, pixel + i, pixel / kQuad, lane_index() * kCount));
      }
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
        const auto y = *reinterpret_cast<const Quad<T>*>(y_ + (first_row_of_warp() + r) * kCodePitch + pixel);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
#pragma unroll
          for (int c = 0; c < kCount; ++c) gradient_[r].at[c] += y.at[i] * dz[i].at[c];
        }
      }
    }
  }

  // Calls body(code, channel, gradient) for the elements that the thread holds.
  template <typename Body>
  DF_DEVICE void for_each(const Body& body) const {
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) body(first_row_of_warp() + r, lane_index() * kCount + c, gradient_[r].at[c]);
    }
  }

 private:
  static constexpr int kCount = kChannels / kWarp;
  using Own = ChannelVector<T, kCount>;

  // Groups of four channels trade places by `key`, which differs between the rows that lanes read together: no bank
  // conflicts.
  static DF_DEVICE T* at(T* rows, int row, int key, int channel) {
    return rows + row * kChannels + ((channel / kQuad) ^ (key % 8)) * kQuad + channel % kQuad;
  }

  TilePlace place_;
  T* y_;         // [kTileCodes][kCodePitch]
  T* codebook_;  // [kTileCodes][kChannels]
  T* dz_;        // [kTilePixels][kChannels]
  Quad<T> dy_own_[kThreadCodes] = {};
  Own gradient_[kWarpRows] = {};
};

}  // namespace dalle_fast::gumbel
