// One task is a head and up to 32 candidates of one prompt. It stores their new keys and values, scores the text and
// the cached tokens that the mask keeps, and weighs their values. The text of a head is read once per task, in pieces
// that stay in the cache while one group of candidates after the other uses them; a candidate's own window is read
// once. Rows that are not T with their channels side by side (16-bit formats, other strides) are converted, a piece at
// a time.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "attention/cpu_decode.h"
#include "attention/params.h"
#include "cpu/simd.h"
#include "cpu/tile_math.h"

namespace dalle_fast {

using namespace attention;

namespace {

constexpr int kTaskCandidates = 32;  // a multiple of kDecodeLanes
constexpr int kPieceRows = 64;       // rows of the text, a multiple of kDecodeLanes
constexpr int kFewestGrouped = 3;    // candidates that are worth a group

template <typename Storage>
Storage* at(const View& view, int64_t batch, int64_t head, int64_t token) {
  return static_cast<Storage*>(view.data) + batch * view.batch + head * view.head + token * view.token;
}

int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// n rows as T, side by side, with zeros after the channels. Offsets and stride in elements.
template <typename Storage, typename T>
void widen_rows(const Storage* data, const int64_t* offset, int64_t stride, int n, int channels, int padded, T* to) {
  simd([=]() DF_INLINE_LAMBDA {
    for (int i = 0; i < n; ++i) {
      const Storage* from = data + offset[i];
      T* row = to + i * padded;
      if (stride == 1) {
        for (int d = 0; d < channels; ++d) row[d] = widen(from[d]);
      } else {
        for (int d = 0; d < channels; ++d) row[d] = widen(from[d * stride]);
      }
      for (int d = channels; d < padded; ++d) row[d] = T(0);
    }
  });
}

template <typename Storage>
void copy_elements(const Storage* from, int64_t from_stride, int n, Storage* to, int64_t to_stride) {
  if (from_stride == 1 && to_stride == 1) {
    std::copy_n(from, n, to);
  } else {
    for (int i = 0; i < n; ++i) to[i * to_stride] = from[i * from_stride];
  }
}

// Offsets of n rows for CacheRows: row(i) is the index of row i in memory.
template <typename Row>
std::vector<int64_t> row_offsets(int n, int64_t stride, const Row& row) {
  std::vector<int64_t> offsets(round_up(n, kDecodeLanes));
  for (int i = 0; i < n; ++i) offsets[i] = row(i) * stride;
  for (size_t i = n; i < offsets.size(); ++i) offsets[i] = offsets[n - 1];
  return offsets;
}

// Scratch of a thread. Elements past the candidates or the keys are read, but not used.
template <typename T>
struct Scratch {
  Scratch(int candidates, int padded, int keys, int pieces)
      : rows(candidates < kFewestGrouped ? candidates : round_up(candidates, kDecodeLanes)),
        pitch(round_up(keys, kDecodeLanes) + kDecodeLanes),
        query(rows * padded),
        grouped_query(rows < kFewestGrouped ? 0 : rows * padded),
        scores(rows * pitch),
        sum(rows * padded),
        total(rows),
        piece(pieces * kPieceRows * padded) {}

  const int rows;
  const int64_t pitch;
  std::vector<T> query;          // [rows, padded], scaled
  std::vector<T> grouped_query;  // [rows / kDecodeLanes, padded, kDecodeLanes]
  std::vector<T> scores;         // [rows, pitch], text first
  std::vector<T> sum;            // [rows, padded]
  std::vector<T> total;          // [rows], of the exponentials
  std::vector<T> piece;          // [kPieceRows, padded]
};

// The rows of one of the views that the new token attends to.
struct VisibleRows {
  View view;
  int n;
  std::vector<int64_t> offsets;
};

template <typename Storage>
class Decoder {
  using T = Arithmetic<Storage>;

 public:
  // `window`: the slots of the cache that the mask keeps, `slot` among them.
  Decoder(const DecodeAttention& params, int slot, const std::vector<int>& window)
      : p_(params),
        slot_(slot),
        channels_(params.shape.channels),
        padded_(round_up(channels_, kDecodeLanes)),
        repeat_(params.shape.batch / params.prompts),
        text_k_(text_of(params.text_k)),
        text_v_(text_of(params.text_v)),
        window_k_(window_of(params.cache_k, window)),
        window_v_(window_of(params.cache_v, window)),
        piece_(row_offsets(kPieceRows, padded_, [](int i) { return i; })) {}

  void run() const {
    const int block = std::min(kTaskCandidates, repeat_), blocks = (repeat_ + block - 1) / block;
    const int64_t tasks = int64_t{p_.prompts} * p_.shape.heads * blocks;
    const bool direct = is_direct(text_k_) && is_direct(text_v_) && is_direct(window_k_) && is_direct(window_v_);
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      Scratch<T> scratch(block, padded_, text_k_.n + window_k_.n, direct ? 0 : 1);
      for (int64_t task = begin; task < end; ++task) {
        const int head = task / blocks % p_.shape.heads, prompt = task / blocks / p_.shape.heads;
        const int first = task % blocks * block;
        decode(prompt, head, prompt * repeat_ + first, std::min(block, repeat_ - first), scratch);
      }
    });
  }

 private:
  VisibleRows text_of(const View& view) const {
    const int n = p_.shape.grid.text_len;
    return {view, n, row_offsets(n, view.token, [](int i) { return i; })};
  }
  VisibleRows window_of(const View& view, const std::vector<int>& window) const {
    const int n = static_cast<int>(window.size());
    return {view, n, row_offsets(n, view.token, [&](int i) { return window[i]; })};
  }

  // True if the kernels can use the rows in place.
  bool is_direct(const VisibleRows& keys) const {
    return std::is_same_v<Storage, T> && keys.view.channel == 1 && channels_ == padded_;
  }

  // Calls visit(rows, index of the first of them) for all keys, a piece at a time.
  template <typename Visit>
  void for_each_piece(const VisibleRows& keys, int batch, int head, Scratch<T>& s, const Visit& visit) const {
    const Storage* data = at<const Storage>(keys.view, batch, head, 0);
    for (int begin = 0; begin < keys.n; begin += kPieceRows) {
      const int n = std::min(kPieceRows, keys.n - begin);
      const int64_t* offset = keys.offsets.data() + begin;
      if constexpr (std::is_same_v<Storage, T>) {
        if (is_direct(keys)) {
          visit(CacheRows<T>{data, offset, n}, begin);
          continue;
        }
      }
      widen_rows(data, offset, keys.view.channel, n, channels_, padded_, s.piece.data());
      visit(CacheRows<T>{s.piece.data(), piece_.data(), n}, begin);
    }
  }

  // Calls group(first candidate) for kDecodeLanes candidates at a time, then single(candidate) if few are left.
  template <typename Group, typename Single>
  void for_each_group(int candidates, const Group& group, const Single& single) const {
    int c = 0;
    for (; candidates - c >= kFewestGrouped; c += kDecodeLanes) group(c);
    for (; c < candidates; ++c) single(c);
  }

  // The new row goes to the cache; the query, scaled, to the scratch.
  void store_new(int candidate, int head, int c, Scratch<T>& s) const {
    const auto row = [&](const View& view, int token) { return at<Storage>(view, candidate, head, token); };
    copy_elements(row(p_.k, 0), p_.k.channel, channels_, row(p_.cache_k, slot_), p_.cache_k.channel);
    copy_elements(row(p_.v, 0), p_.v.channel, channels_, row(p_.cache_v, slot_), p_.cache_v.channel);
    T* query = s.query.data() + c * padded_;
    const int64_t offset = 0;
    widen_rows(row(p_.q, 0), &offset, p_.q.channel, 1, channels_, padded_, query);
    for (int d = 0; d < channels_; ++d) query[d] *= static_cast<T>(p_.shape.scale);
    if (s.rows < kFewestGrouped) return;
    T* grouped = s.grouped_query.data() + c / kDecodeLanes * kDecodeLanes * padded_ + c % kDecodeLanes;
    for (int d = 0; d < channels_; ++d) grouped[d * kDecodeLanes] = query[d];
  }

  void decode(int prompt, int head, int first, int candidates, Scratch<T>& s) const {
    const int64_t pitch = s.pitch;
    const auto scores = [&](int c) { return s.scores.data() + c * pitch; };
    const auto query = [&](int c) { return s.query.data() + c * padded_; };
    const auto grouped_query = [&](int c) { return s.grouped_query.data() + c * padded_; };
    const auto sum = [&](int c) { return s.sum.data() + c * padded_; };

    for (int c = 0; c < candidates; ++c) store_new(first + c, head, c, s);
    for_each_piece(text_k_, prompt, head, s, [&](CacheRows<T> rows, int key) {
      for_each_group(
          candidates, [&](int c) { score_rows_of_group(rows, padded_, grouped_query(c), scores(c) + key, pitch); },
          [&](int c) { score_rows(rows, padded_, query(c), scores(c) + key); });
    });
    for (int c = 0; c < candidates; ++c) {
      T* of_window = scores(c) + text_k_.n;
      for_each_piece(window_k_, first + c, head, s,
                     [&](CacheRows<T> rows, int key) { score_rows(rows, padded_, query(c), of_window + key); });
      s.total[c] = exp_row(scores(c), text_k_.n + window_k_.n);
    }

    std::fill(s.sum.begin(), s.sum.end(), T(0));
    for_each_piece(text_v_, prompt, head, s, [&](CacheRows<T> rows, int key) {
      for_each_group(
          candidates, [&](int c) { add_rows_of_group(rows, padded_, scores(c) + key, pitch, sum(c)); },
          [&](int c) { add_rows(rows, padded_, scores(c) + key, sum(c)); });
    });
    for (int c = 0; c < candidates; ++c) {
      const T* of_window = scores(c) + text_k_.n;
      for_each_piece(window_v_, first + c, head, s,
                     [&](CacheRows<T> rows, int key) { add_rows(rows, padded_, of_window + key, sum(c)); });
      Storage* out = at<Storage>(p_.out, first + c, head, 0);
      const T inverse = 1 / s.total[c];
      for (int d = 0; d < channels_; ++d) out[d] = narrow<Storage>(sum(c)[d] * inverse);
    }
  }

  const DecodeAttention& p_;
  const int slot_;  // of the new token
  const int channels_, padded_;
  const int repeat_;  // candidates per prompt
  const VisibleRows text_k_, text_v_, window_k_, window_v_;
  const std::vector<int64_t> piece_;  // offsets of converted rows
};

}  // namespace

void decode_attention_cpu(const DecodeAttention& params) {
  int slot = 0;
  std::vector<int> window;
  with_mask(params.shape.kind, params.shape.grid, [&](const auto& mask) {
    const int query = mask.position(static_cast<int>(*params.position));
    slot = mask.cache_slot(query);
    for (int i = 0; i < mask.runs(); ++i) {
      const KeyRange run = mask.run(query, i);
      for (int key = run.begin; key < run.end; ++key) window.push_back(mask.cache_slot(key));
    }
  });
  with_format(params.shape.format, [&](auto element) { Decoder<decltype(element)>(params, slot, window).run(); });
}

}  // namespace dalle_fast
