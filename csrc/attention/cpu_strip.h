// Attention on strips of kStripRows queries by panels of kPanelKeys keys: the tile of a product that the registers
// hold.
//
// The scores of a strip are its panels one after another, each [kStripRows, kPanelKeys]. A panel of keys is read where
// it lies in a transposed matrix [channels, keys], and may start at any key. Matrices of rows are kept kPanelKeys
// channels at a time, [width / kPanelKeys, rows, kPanelKeys], so that the products over keys read them in order too.
// `width` is the number of channels, rounded up to a multiple of kPanelKeys.
#pragma once

#include <cstdint>

namespace dalle_fast::attention {

constexpr int kStripRows = 6;

// One cache line.
template <typename T>
constexpr int kPanelKeys = 64 / sizeof(T);

template <typename T>
constexpr int kPanelSize = kStripRows * kPanelKeys<T>;

template <typename T>
constexpr int panels_of(int keys) {
  return (keys + kPanelKeys<T> - 1) / kPanelKeys<T>;
}

// Consecutive keys that a strip sees, from `slot` on; its scores are the next panels_of(count) panels.
struct KeySpan {
  int slot;
  int count;
};

// Bit j of keep[r]: query r of the strip sees key j of the panel.
struct PanelMask {
  int panel;
  uint16_t keep[kStripRows];
};

template <typename T>
struct StripKernels {
  // to[j, i] = from[i, j], for kPanelKeys rows and columns.
  void (*transpose)(const T* from, int64_t from_row, T* to, int64_t to_row);

  // scores[r, j] = queries[r] . keys[:, j] for one panel of each of `strips` strips, whose queries lie kStripRows *
  // width and whose scores lie scores_strip elements apart; a channel's keys lie keys_row elements apart.
  void (*score)(int64_t width, int strips, const T* queries, const T* keys, int64_t keys_row, T* scores,
                int64_t scores_strip);

  // Sets the scores that the masks hide to -inf.
  void (*hide)(const PanelMask* masks, int count, T* scores);

  // Scores become weights exp2(score - max); the rows' maxima, and the sums of the weights, are [kStripRows].
  void (*softmax)(int panels, T* scores, T* maxima, T* sums);

  // Scores become p = exp2(score - lse) and dp becomes p (dp - delta).
  void (*softmax_backward)(int panels, T* scores, T* dp, const T* lse, const T* delta);

  // out[r, :] = sum over the keys j of all spans of weights[r, j] rows[j], for kPanelKeys channels.
  void (*weigh)(int64_t width, const T* weights, const KeySpan* spans, int count, const T* rows, T* out);

  // keys[:, j] += sum over the strips' queries r of weights[r, j] queries[r], for one panel of keys; strides as in
  // score.
  void (*accumulate)(int64_t width, int strips, const T* queries, const T* weights, int64_t weights_strip, T* keys,
                     int64_t keys_row);
};

// The kernels for this processor and width.
template <typename T>
StripKernels<T> strip_kernels(int64_t width);

}  // namespace dalle_fast::attention
