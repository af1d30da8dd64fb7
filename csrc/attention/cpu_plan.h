// The plan of a call of sparse_attention and the copies of a head. The plan says which keys each strip of queries
// attends to: it follows from the mask alone, and all heads share it. Queries, keys, values and gradients are copied
// between the tensors of the call and the order in which the kernels of attention/cpu_strip.h read them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "attention/cpu_strip.h"
#include "attention/params.h"
#include "common/format.h"
#include "common/mask.h"
#include "cpu/simd.h"

namespace dalle_fast::attention {

// Neighbouring queries, in the mask's own order; text or image.
struct Strip {
  int first;
  int count;        // at most kStripRows
  int text_panels;  // of the scores, which start with them
  int panels;
  int first_span, spans;
  int first_mask, masks;
};

// Keys have slots: the text from 0, the image from text_slots, a multiple of kPanelKeys.
template <typename T>
struct AttentionPlan {
  int text_len, image_len, text_slots;
  int max_panels = 0;
  std::vector<Strip> strips;  // text_panels grow
  std::vector<KeySpan> spans;
  std::vector<PanelMask> masks;

  template <typename Mask>
  explicit AttentionPlan(const Mask& mask)
      : text_len(mask.text_len), image_len(mask.image_len()), text_slots(panels_of<T>(text_len) * kPanelKeys<T>) {
    for (int first = 0; first < text_len; first += kStripRows) add_strip(mask, first, text_len);
    for (int first = 0; first < image_len; first += kStripRows) add_strip(mask, text_len + first, text_len + image_len);
  }

 private:
  template <typename Mask>
  void add_strip(const Mask& mask, int first, int end) {
    Strip strip = {};
    strip.first = first;
    strip.count = std::min(kStripRows, end - first);
    strip.first_span = spans.size();
    strip.first_mask = masks.size();
    const int last = first + strip.count - 1;
    const int text = std::min(last + 1, text_len);
    if (text > 0) spans.push_back({0, text});
    strip.text_panels = panels_of<T>(text);
    if (first >= text_len) add_image_spans(mask, strip, last - text_len);
    strip.spans = spans.size() - strip.first_span;
    for (int s = 0; s < strip.spans; ++s) {
      const KeySpan span = spans[strip.first_span + s];
      for (int i = 0; i < panels_of<T>(span.count); ++i) add_mask(mask, strip, span.slot + i * kPanelKeys<T>, span);
    }
    strip.masks = masks.size() - strip.first_mask;
    max_panels = std::max(max_panels, strip.panels);
    strips.push_back(strip);
  }

  // The keys that the strip's queries see of each run, joined where that takes no more panels.
  template <typename Mask>
  void add_image_spans(const Mask& mask, const Strip& strip, int last) {
    for (int i = 0; i < mask.runs(); ++i) {
      KeyRange seen = mask.run(strip.first - text_len, i);
      for (int q = strip.first - text_len + 1; q <= last; ++q) {
        const KeyRange run = mask.run(q, i);
        if (run.begin >= run.end) continue;
        seen = seen.begin < seen.end ? KeyRange{std::min(seen.begin, run.begin), std::max(seen.end, run.end)} : run;
      }
      if (seen.begin >= seen.end) continue;
      const KeySpan span = {text_slots + seen.begin, seen.end - seen.begin};
      const bool first_of_image = spans.size() == strip.first_span + (text_len > 0 ? 1u : 0u);
      if (!first_of_image && span.slot <= spans.back().slot + panels_of<T>(spans.back().count) * kPanelKeys<T>) {
        spans.back().count = span.slot + span.count - spans.back().slot;
      } else {
        spans.push_back(span);
      }
    }
  }

  // The next panel of the strip's scores: its keys start at `slot` and end with the span.
  template <typename Mask>
  void add_mask(const Mask& mask, Strip& strip, int slot, const KeySpan& span) {
    const bool text = slot < text_slots;
    const int begin = text ? slot : slot - text_slots;
    const int end = std::min(begin + kPanelKeys<T>, begin + span.slot + span.count - slot);
    PanelMask panel = {strip.panels++, {}};
    bool all = end - begin == kPanelKeys<T>;
    for (int r = 0; r < kStripRows; ++r) {  // rows past the end repeat the last one
      const int query = strip.first + std::min(r, strip.count - 1);
      unsigned keep = 0;
      const auto see = [&](int from, int to) {
        from = std::max(from, begin) - begin;
        to = std::min(to, end) - begin;
        if (from < to) keep |= ((1u << (to - from)) - 1) << from;
      };
      if (text) {
        see(0, query + 1);
      } else {
        for (int i = 0; i < mask.runs(); ++i) {
          const KeyRange run = mask.run(query - text_len, i);
          see(run.begin, run.end);
        }
      }
      panel.keep[r] = keep;
      all = all && keep == (1u << kPanelKeys<T>)-1;
    }
    if (!all) masks.push_back(panel);
  }
};

// One head of a tensor.
template <typename Storage>
struct Head {
  Storage* data;
  int64_t token, channel;  // strides in elements

  Head(const View& view, int b, int h)
      : data(static_cast<Storage*>(view.data) + b * view.batch + h * view.head),
        token(view.token),
        channel(view.channel) {}
};

// Calls f with the stride between channels, as a constant where it is 1, which lets the loops vectorise.
template <typename F>
void with_channel_stride(int64_t stride, F&& f) {
  if (stride == 1) {
    f(std::integral_constant<int64_t, 1>());
  } else {
    f(stride);
  }
}

// The sizes of one call, and its mask over the whole stream: text first, then the image in the mask's own order.
template <typename T, typename Mask>
struct Problem {
  static constexpr int kKeys = kPanelKeys<T>;

  Mask mask;
  AttentionPlan<T> plan;
  int channels;
  int text_len = plan.text_len, image_len = plan.image_len, seq_len = text_len + image_len;
  int slots = plan.text_slots + image_len + kKeys;  // a panel of keys may start at the last one
  int64_t width = panels_of<T>(channels) * kKeys;
  int64_t pitch = image_pitch(image_len);
  int64_t scores_strip = int64_t{plan.max_panels} * kPanelSize<T>;
  StripKernels<T> kernels = strip_kernels<T>(width);

  Problem(const Mask& m, int channels) : mask(m), plan(m), channels(channels) {}

  int64_t token(int i) const { return i < text_len ? i : text_len + mask.token(i - text_len); }
  int64_t keys_size() const { return width * (plan.text_slots + pitch); }
  int64_t rows_size() const { return width * slots; }

 private:
  // Elements from one channel's keys to the next; no multiple of 4 KB, which would map all channels to the same few
  // cache lines.
  static int64_t image_pitch(int image_len) {
    const int64_t pitch = int64_t{panels_of<T>(image_len)} * kKeys + kKeys;
    return pitch * sizeof(T) % 4096 == 0 ? pitch + kKeys : pitch;
  }
};

// Keys by channel. The text [panels, channels, kPanelKeys] is read in order; the image [channels, pitch] from any key
// on.
template <typename T>
struct KeyColumns {
  T* data;
  int64_t row;  // from one channel to the next
};

template <typename T, typename P>
KeyColumns<T> keys_at(T* keys, const P& problem, int slot) {
  const int text_slots = problem.plan.text_slots;
  if (slot < text_slots) return {keys + slot * problem.width, P::kKeys};
  return {keys + text_slots * problem.width + slot - text_slots, problem.pitch};
}

// Calls f(first token, tokens, slot) for the panels of all keys.
template <typename P, typename F>
void for_each_panel(const P& problem, F&& f) {
  for (int i = 0; i < problem.text_len; i += P::kKeys) f(i, std::min(P::kKeys, problem.text_len - i), i);
  for (int i = 0; i < problem.image_len; i += P::kKeys) {
    f(problem.text_len + i, std::min(P::kKeys, problem.image_len - i), problem.plan.text_slots + i);
  }
}

// Calls f(first channel, channels) for kKeys channels at a time.
template <typename P, typename F>
void for_each_block(const P& problem, F&& f) {
  int d = 0;
  for (; d + P::kKeys <= problem.channels; d += P::kKeys) f(d, std::integral_constant<int, P::kKeys>());
  if (d < problem.channels) f(d, problem.channels - d);
}

template <typename Storage, typename Stride, typename N, typename T>
void pack_row(const Storage* __restrict__ from, Stride from_stride, N n, T scale, T* __restrict__ to) {
  for (int d = 0; d < n; ++d) to[d] = widen(from[d * from_stride]) * scale;
}

template <typename T, typename N, typename Stride, typename Storage>
void unpack_row(const T* __restrict__ from, N n, T scale, Storage* __restrict__ to, Stride to_stride) {
  for (int d = 0; d < n; ++d) to[d * to_stride] = narrow<Storage>(from[d] * scale);
}

// Tokens first ... first + count as rows: kKeys channels at a time, each kKeys rows or more apart in `to`.
template <typename Storage, typename Stride, typename P, typename T>
void pack_panel(const Head<const Storage>& from, Stride stride, const P& problem, int first, int count, T* to,
                int64_t block) {
  for (int i = 0; i < count; ++i) {
    const Storage* row = from.data + problem.token(first + i) * from.token;
    for_each_block(problem, [&](int d, auto n) {
      pack_row(row + d * stride, stride, n, T(1), to + d / P::kKeys * block + i * P::kKeys);
    });
  }
}

template <typename Storage, typename P, typename T>
void pack_rows(const Head<const Storage>& from, const P& problem, T* to) {
  with_channel_stride(from.channel, [&](auto stride) {
    for_each_panel(problem, [&](int first, int count, int slot) {
      pack_panel(from, stride, problem, first, count, to + int64_t{slot} * P::kKeys, int64_t{problem.slots} * P::kKeys);
    });
  });
}

// `rows`: scratch for kKeys rows.
template <typename Storage, typename P, typename T>
void pack_keys(const Head<const Storage>& from, const P& problem, T* rows, T* to) {
  constexpr int64_t kBlock = P::kKeys * P::kKeys;
  with_channel_stride(from.channel, [&](auto stride) {
    for_each_panel(problem, [&](int first, int count, int slot) {
      pack_panel(from, stride, problem, first, count, rows, kBlock);
      const KeyColumns<T> keys = keys_at(to, problem, slot);
      for (int64_t d = 0; d < problem.width; d += P::kKeys) {
        problem.kernels.transpose(rows + d * P::kKeys, P::kKeys, keys.data + d * keys.row, keys.row);
      }
    });
  });
}

// Fetches the lines of tokens first ... first + count ahead of their use: heads lie far apart, so nothing else does.
// Inlined, because a function that only prefetches has no effect that the compiler knows of.
template <typename Storage, typename P>
DF_ALWAYS_INLINE void prefetch_rows(const Head<Storage>& head, const P& problem, int first, int count) {
  constexpr int kLine = 64;
  for (int i = 0; i < count; ++i) {
    const char* row = reinterpret_cast<const char*>(head.data + problem.token(first + i) * head.token);
    for (int64_t j = 0; j < problem.channels * int64_t{sizeof(Storage)}; j += kLine) __builtin_prefetch(row + j);
  }
}

template <typename Storage, typename P, typename T>
void unpack_keys(const T* from, const P& problem, T scale, T* rows, const Head<Storage>& to) {
  with_channel_stride(to.channel, [&](auto stride) {
    for_each_panel(problem, [&](int first, int count, int slot) {
      prefetch_rows(to, problem, first, count);
      const KeyColumns<const T> keys = keys_at(from, problem, slot);
      for (int64_t d = 0; d < problem.width; d += P::kKeys) {
        problem.kernels.transpose(keys.data + d * keys.row, keys.row, rows + d * P::kKeys, P::kKeys);
      }
      for (int i = 0; i < count; ++i) {
        Storage* row = to.data + problem.token(first + i) * to.token;
        for_each_block(
            problem, [&](int d, auto n) { unpack_row(rows + (d + i) * P::kKeys, n, scale, row + d * stride, stride); });
      }
    });
  });
}

}  // namespace dalle_fast::attention
