// The masks for kernels that take their kind at run time, so that one instance of a kernel serves all. A choice costs a
// branch that all threads take alike: it is made for blocks of keys, never for a single pair.
//
// Tokens are numbered over the whole stream: text, then the image in the mask's own order.
#pragma once

#include "common/mask.h"
#include "cuda/device.h"

namespace dalle_fast::attention {

struct StreamMask {
  MaskKind kind;
  Grid grid;

  template <typename F>
  DF_DEVICE auto with_image_mask(F&& f) const {
    return with_mask(kind, grid, f);
  }

  DF_DEVICE bool is_text(int i) const { return i < grid.text_len; }

  // The index of a token in memory. Only one mask has an order of its own: that takes a comparison, where choosing the
  // mask would be a jump for every row that a kernel loads.
  DF_DEVICE int token(int i) const {
    if (kind != MaskKind::kColumn || is_text(i)) return i;
    return grid.text_len + ColumnMask{grid}.token(i - grid.text_len);
  }

  // The keys of a query as ranges: the text, then those of the image.
  DF_DEVICE int ranges(int query) const {
    return is_text(query) ? 1 : 1 + with_image_mask([](const auto& mask) { return mask.runs(); });
  }
  DF_DEVICE KeyRange range(int query, int i) const {
    const int text_len = grid.text_len;
    if (i == 0) return {0, min(query + 1, text_len)};
    return with_image_mask([=](const auto& mask) {
      const KeyRange run = mask.run(query - text_len, i - 1);
      return KeyRange{text_len + run.begin, text_len + run.end};
    });
  }

  // The image tokens that may see each other: keys of queries first ... last, and queries of keys first ... last.
  DF_DEVICE KeyRange keys_of(int first, int last) const {
    const int text_len = grid.text_len;
    return with_image_mask([=](const auto& mask) {
      return KeyRange{text_len + mask.first_key(first - text_len), text_len + mask.last_key(last - text_len) + 1};
    });
  }
  DF_DEVICE KeyRange queries_of(int first, int last) const {
    const int text_len = grid.text_len;
    return {first, text_len + with_image_mask([=](const auto& mask) { return mask.last_query(last - text_len); }) + 1};
  }

  // True if one of the queries sees one of the keys. Both are ranges of image tokens, ends included, one of them inside
  // the window of the other: only a window of several runs has gaps.
  DF_DEVICE bool meet(int first_query, int last_query, int first_key, int last_key) const {
    if (kind != MaskKind::kConv) return true;
    const int text_len = grid.text_len;
    const ConvMask mask{{grid}};
    for (int i = 0; i < mask.runs(); ++i) {
      if (mask.run(first_query - text_len, i).begin <= last_key - text_len &&
          mask.run(last_query - text_len, i).end > first_key - text_len) {
        return true;
      }
    }
    return false;
  }

  // Bits of the keys first ... first + 31 that the query sees, the first lowest. If the first is text, so are all.
  DF_DEVICE uint32_t keep(int query, int first) const {
    if (is_text(first)) return bits(0 - first, min(query + 1, grid.text_len) - first);
    if (is_text(query)) return 0;
    query -= grid.text_len;
    first -= grid.text_len;
    return with_image_mask([=](const auto& mask) {
      uint32_t seen = 0;
      for (int i = 0; i < mask.runs(); ++i) {
        const KeyRange run = mask.run(query, i);
        seen |= bits(run.begin - first, run.end - first);
      }
      return seen;
    });
  }

 private:
  // Bits begin ... end - 1.
  DF_DEVICE static uint32_t bits(int begin, int end) {
    begin = max(begin, 0);
    end = min(end, 32);
    return begin < end ? 0xFFFFFFFFu >> (32 - (end - begin)) << begin : 0;
  }
};

}  // namespace dalle_fast::attention
