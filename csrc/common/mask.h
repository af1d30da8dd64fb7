// The attention masks of the paper (appendix B.1): which image token sees which; for host and device.
//
// Text is the same for every kind and is not here: text sees earlier text and itself, an image token sees all text.
// All positions below are image positions 0 .. image_len - 1 in the mask's own order, in which what a query sees lies
// close behind it; token(i) is the raster index of position i. Every mask is causal in its own order: key <= query.
//
// A mask is a struct with
//   keep(q, k)             whether q sees k
//   first_key, last_key    the window of q: it sees nothing outside; both grow with q
//   last_query(k)          no later query sees k; grows with k
//   runs, run(q, i)        the keys of q as `runs` ascending ranges, each possibly empty; both ends grow with q
//   token, position        own order -> raster, and back
//   cache_len, cache_slot  decoding: slots needed, and the slot of a position; tokens that can still be seen never
//   share one
#pragma once

#include "common/host_device.h"

namespace dalle_fast {

// The numbers are those of AttentionMask.kind_id.
enum class MaskKind : int { kFull = 0, kRow = 1, kColumn = 2, kConv = 3 };
constexpr int kMaskKinds = 4;

struct KeyRange {
  int begin;
  int end;  // exclusive
};

// Sizes in tokens; `kernel` is the edge of the conv neighbourhood, odd.
struct Grid {
  int text_len;
  int height;
  int width;
  int kernel;

  DF_HOST_DEVICE int image_len() const { return height * width; }
  DF_HOST_DEVICE int seq_len() const { return text_len + image_len(); }

 protected:
  DF_HOST_DEVICE static int smaller(int a, int b) { return a < b ? a : b; }
  DF_HOST_DEVICE static int larger(int a, int b) { return a > b ? a : b; }
};

// Shared by most masks: raster order, the query as its own last key, one run.
struct RasterMask : Grid {
  DF_HOST_DEVICE int last_key(int q) const { return q; }
  DF_HOST_DEVICE int runs() const { return 1; }
  DF_HOST_DEVICE int token(int i) const { return i; }
  DF_HOST_DEVICE int position(int token) const { return token; }
};

// Every earlier image token, and itself.
struct FullMask : RasterMask {
  DF_HOST_DEVICE bool keep(int q, int k) const { return k <= q; }
  DF_HOST_DEVICE int first_key(int) const { return 0; }
  DF_HOST_DEVICE int last_query(int) const { return image_len() - 1; }
  DF_HOST_DEVICE KeyRange run(int q, int) const { return {0, q + 1}; }
  DF_HOST_DEVICE int cache_len() const { return image_len(); }
  DF_HOST_DEVICE int cache_slot(int i) const { return i; }
};

// Itself and the `width` tokens before it; decoding keeps a ring of them.
struct RowMask : RasterMask {
  DF_HOST_DEVICE bool keep(int q, int k) const { return k <= q && k >= q - width; }
  DF_HOST_DEVICE int first_key(int q) const { return larger(q - width, 0); }
  DF_HOST_DEVICE int last_query(int k) const { return smaller(k + width, image_len() - 1); }
  DF_HOST_DEVICE KeyRange run(int q, int) const { return {first_key(q), q + 1}; }
  DF_HOST_DEVICE int cache_len() const { return smaller(width + 1, image_len()); }
  DF_HOST_DEVICE int cache_slot(int i) const { return i % cache_len(); }
};

// The tokens of its own column in rows up to its own. Column-major order makes that one run.
struct ColumnMask : Grid {
  DF_HOST_DEVICE bool keep(int q, int k) const { return k <= q && k >= first_key(q); }
  DF_HOST_DEVICE int first_key(int q) const { return q - q % height; }
  DF_HOST_DEVICE int last_key(int q) const { return q; }
  DF_HOST_DEVICE int last_query(int k) const { return k - k % height + height - 1; }
  DF_HOST_DEVICE int runs() const { return 1; }
  DF_HOST_DEVICE KeyRange run(int q, int) const { return {first_key(q), q + 1}; }
  DF_HOST_DEVICE int token(int i) const { return i % height * width + i / height; }
  DF_HOST_DEVICE int position(int token) const { return token % width * height + token / width; }
  DF_HOST_DEVICE int cache_len() const { return image_len(); }
  DF_HOST_DEVICE int cache_slot(int i) const { return i; }
};

// The causal half of a kernel x kernel neighbourhood that wraps in raster order; decoding keeps a ring.
// With r = kernel / 2 and e = q - k + r, a key k <= q is seen when e / width <= r and e % width <= 2 r.
struct ConvMask : RasterMask {
  DF_HOST_DEVICE int radius() const { return kernel / 2; }
  // The largest e % width that is seen, and with it the largest q - k.
  DF_HOST_DEVICE int span() const { return smaller(2 * radius(), width - 1); }
  DF_HOST_DEVICE int reach() const { return radius() * width + span() - radius(); }

  DF_HOST_DEVICE bool keep(int q, int k) const {
    const int e = q - k + radius();
    return k <= q && e / width <= radius() && e % width <= span();
  }
  DF_HOST_DEVICE int first_key(int q) const { return larger(q - reach(), 0); }
  DF_HOST_DEVICE int last_query(int k) const { return smaller(k + reach(), image_len() - 1); }
  DF_HOST_DEVICE int runs() const { return radius() + 1; }
  // Run i is the row of the neighbourhood with e / width = radius - i.
  DF_HOST_DEVICE KeyRange run(int q, int i) const {
    const int nearest = q + radius() - (radius() - i) * width;
    const int begin = larger(nearest - span(), 0);
    return {begin, larger(smaller(nearest, q) + 1, begin)};
  }
  DF_HOST_DEVICE int cache_len() const { return smaller(reach() + 1, image_len()); }
  DF_HOST_DEVICE int cache_slot(int i) const { return i % cache_len(); }
};

// Calls f with the mask of that kind: the one place where a kind becomes a type.
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // f is for the side that calls
#endif
template <class F>
DF_HOST_DEVICE auto with_mask(MaskKind kind, const Grid& grid, F&& f) {
  switch (kind) {
    case MaskKind::kRow:
      return f(RowMask{{grid}});
    case MaskKind::kColumn:
      return f(ColumnMask{grid});
    case MaskKind::kConv:
      return f(ConvMask{{grid}});
    default:
      return f(FullMask{{grid}});
  }
}

}  // namespace dalle_fast
