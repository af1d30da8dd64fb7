// Which keys each strip of queries meets: made once per call, from the mask alone, and shared by all heads.
#pragma once

#include <algorithm>
#include <vector>

#include "attention/cpu_strip.h"
#include "common/mask.h"

namespace dalle_fast {

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

  // What the strip's queries see of each run, joined where that takes no more panels.
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
    for (int r = 0; r < kStripRows; ++r) {  // rows past the end do as the last one
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

}  // namespace dalle_fast
