// A head's keys, values and their gradients between the tensors of a call and the order in which the kernels read them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "attention/cpu_plan.h"
#include "attention/cpu_strip.h"
#include "attention/params.h"
#include "cpu/simd.h"

namespace dalle_fast {

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
struct Keys {
  T* data;
  int64_t row;  // from one channel to the next
};

template <typename T, typename P>
Keys<T> keys_at(T* keys, const P& problem, int slot) {
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

// Calls f(first channel, channels) for each panel's worth of them.
template <typename P, typename F>
void for_each_block(const P& problem, F&& f) {
  int d = 0;
  for (; d + P::kKeys <= problem.channels; d += P::kKeys) f(d, std::integral_constant<int, P::kKeys>());
  if (d < problem.channels) f(d, problem.channels - d);
}

template <typename Storage, typename Stride, typename N, typename T>
void copy_row(const Storage* __restrict__ from, Stride from_stride, N n, T scale, T* __restrict__ to) {
  for (int d = 0; d < n; ++d) to[d] = widen(from[d * from_stride]) * scale;
}

template <typename T, typename N, typename Stride, typename Storage>
void copy_row(const T* __restrict__ from, N n, T scale, Storage* __restrict__ to, Stride to_stride) {
  for (int d = 0; d < n; ++d) to[d * to_stride] = narrow<Storage>(from[d] * scale);
}

// Tokens first ... first + count as rows: kKeys channels at a time, each kKeys rows or more apart in `to`.
template <typename Storage, typename Stride, typename P, typename T>
void pack_panel(const Head<const Storage>& from, Stride stride, const P& problem, int first, int count, T* to,
                int64_t block) {
  for (int i = 0; i < count; ++i) {
    const Storage* row = from.data + problem.token(first + i) * from.token;
    for_each_block(problem, [&](int d, auto n) {
      copy_row(row + d * stride, stride, n, T(1), to + d / P::kKeys * block + i * P::kKeys);
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

// `rows` is room for kKeys rows.
template <typename Storage, typename P, typename T>
void pack_keys(const Head<const Storage>& from, const P& problem, T* rows, T* to) {
  constexpr int64_t kBlock = P::kKeys * P::kKeys;
  with_channel_stride(from.channel, [&](auto stride) {
    for_each_panel(problem, [&](int first, int count, int slot) {
      pack_panel(from, stride, problem, first, count, rows, kBlock);
      const Keys<T> keys = keys_at(to, problem, slot);
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
      const Keys<const T> keys = keys_at(from, problem, slot);
      for (int64_t d = 0; d < problem.width; d += P::kKeys) {
        problem.kernels.transpose(keys.data + d * keys.row, keys.row, rows + d * P::kKeys, P::kKeys);
      }
      for (int i = 0; i < count; ++i) {
        Storage* row = to.data + problem.token(first + i) * to.token;
        for_each_block(problem,
                       [&](int d, auto n) { copy_row(rows + (d + i) * P::kKeys, n, scale, row + d * stride, stride); });
      }
    });
  });
}

}  // namespace dalle_fast
