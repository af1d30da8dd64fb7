// A block owns a row. The row stays in shared memory, as integers in the order of the logits, if it fits (28,000 codes
// with top_p, 56,000 without, on sm_90); longer rows are read from memory again in every pass.
//
// Nothing is sorted: top-k and top-p find the last logit they keep by bisection over its bits, each step a count, or a
// sum of weights in units of 2^-30, over the row. These sums are of integers and so exact: what is kept is what the
// definition keeps. The draw is exact, too: of the noisy logits in float32, those near the largest are computed again
// in float64, and only two codes whose exact scores differ by less than the last place of a logarithm could change
// places.
#include <cfloat>
#include <climits>
#include <limits>

#include "common/format.h"
#include "cuda/intrinsics.h"
#include "cuda/noise.h"
#include "cuda/reduce.h"
#include "sample/sample.h"

namespace dalle_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kStaticShared = 1024;  // bytes, more than the kernel declares
constexpr float kDropped = -std::numeric_limits<float>::infinity();
// More than twice the error of a float32 score within reach of the largest, at most 20 away from it: 1e-5.
constexpr float kMargin = 0x1p-14f;

// Integers in the order of the floats, and back; the zeros are equal.
DF_DEVICE int key_of(float x) {
  const int bits = x == 0 ? 0 : __float_as_int(x);
  return bits ^ ((bits >> 31) & INT_MAX);
}
DF_DEVICE float float_of(int key) { return __int_as_float(key ^ ((key >> 31) & INT_MAX)); }

struct LargerOrNan {
  DF_DEVICE float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

// A code and its exact score.
struct Scored {
  double score;
  int64_t code;
};

struct Better {
  DF_DEVICE Scored operator()(const Scored& a, const Scored& b) const {
    return a.score > b.score || (a.score == b.score && a.code < b.code) ? a : b;
  }
};

class Row {
 public:
  // `keys` and `weights` are shared memory for the row, or null.
  DF_DEVICE Row(const Sample& s, int* keys, int* weights)
      : s_(s), offset_(blockIdx.x * s.row_stride), keys_(keys), weights_(weights) {}

  // Reads the row; returns its largest value, or NaN if there is one.
  DF_DEVICE float load() {
    float largest = kDropped;
    for_each([&](int64_t i) {
      const float x = logit(i);
      if (keys_ != nullptr) keys_[i] = key_of(x);
      largest = LargerOrNan()(x, largest);
    });
    return largest_ = reduce(largest, LargerOrNan());
  }

  DF_DEVICE void keep_top_k() {
    last_ = last_kept(key_of(kDropped), s_.top_k, [&](int64_t key) {
      int count = 0;
      for_each([&](int64_t i) { count += this->key(i) >= key; });
      return reduce(count, Add());
    });
  }

  DF_DEVICE void keep_top_p() {
    for_each([&](int64_t i) {
      if (weights_ != nullptr) weights_[i] = weight_of(key(i));
    });
    const auto sum_from = [&](int64_t key) {
      int64_t sum = 0;
      for_each([&](int64_t i) {
        if (this->key(i) >= key) sum += weights_ != nullptr ? weights_[i] : weight_of(this->key(i));
      });
      return reduce(sum, Add());
    };
    const double goal = s_.top_p * static_cast<double>(sum_from(last_));
    last_ = last_kept(last_, goal, [&](int64_t key) { return static_cast<double>(sum_from(key)); });
    // Of equal logits, the first ones stay: one as long as those before it do not reach the goal.
    const int64_t before = sum_from(int64_t{last_} + 1), weight = weight_of(last_);
    auto wanted = static_cast<int64_t>((goal - static_cast<double>(before)) / static_cast<double>(weight));
    while (wanted > 0 && static_cast<double>(before + (wanted - 1) * weight) >= goal) --wanted;
    while (static_cast<double>(before + wanted * weight) < goal) ++wanted;
    const auto equal_before = [&](int64_t end) {
      int count = 0;
      for_each([&](int64_t i) { count += i < end && key(i) == last_; });
      return reduce(count, Add());
    };
    if (equal_before(s_.codes) <= wanted) return;
    int64_t low = 0;
    while (end_of_equal_ - low > 1) {
      const int64_t middle = low + (end_of_equal_ - low) / 2;
      (equal_before(middle) >= wanted ? end_of_equal_ : low) = middle;
    }
  }

  DF_DEVICE int64_t draw() {
    const auto seed = static_cast<uint64_t>(*s_.seed);
    const uint64_t first = static_cast<uint64_t>(*s_.first) + blockIdx.x * static_cast<uint64_t>(s_.pitch);
    const double inverse_exact = 1 / s_.temperature;
    const float inverse = inverse_exact < FLT_MIN ? FLT_MIN : inverse_exact > FLT_MAX ? FLT_MAX : inverse_exact;
    const auto score = [&](int64_t i, uint32_t word) {
      const int key = this->key(i);
      const bool kept = key > last_ || (key == last_ && i < end_of_equal_);
      return kept ? (float_of(key) - largest_) * inverse + gumbel_from_word(word) : kDropped;
    };
    // A thread takes the elements of one block of Philox at a time.
    float best = std::numeric_limits<float>::lowest();
    const int64_t skipped = static_cast<int64_t>(first % kQuad);
    for (int64_t begin = int64_t{threadIdx.x} * kQuad - skipped; begin < s_.codes; begin += kThreads * kQuad) {
      const PhiloxWords drawn = philox(seed, (first + static_cast<uint64_t>(begin)) / kQuad);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        const int64_t i = begin + j;
        if (i < 0 || i >= s_.codes) continue;
        const float x = score(i, drawn.word[j]);
        if (keys_ != nullptr) keys_[i] = __float_as_int(x);
        best = Larger()(best, x);
      }
    }
    best = reduce(best, Larger());
    Scored exact{-std::numeric_limits<double>::infinity(), s_.codes};
    for_each([&](int64_t i) {
      const float x =
          keys_ != nullptr ? __int_as_float(keys_[i]) : score(i, element_word(seed, first + static_cast<uint64_t>(i)));
      if (!(x >= best - kMargin)) return;
      const double u = uniform_from_word(element_word(seed, first + static_cast<uint64_t>(i)));
      const double distance = (static_cast<double>(logit(i)) - largest_) / s_.temperature;
      exact = Better()(exact, {distance - log(-log(u)), i});
    });
    return reduce(exact, Better()).code;
  }

 private:
  template <typename Body>
  DF_DEVICE void for_each(const Body& body) {
    for (int64_t i = threadIdx.x; i < s_.codes; i += kThreads) body(i);
  }

  template <typename T, typename Op>
  DF_DEVICE T reduce(T x, Op op) {
    __shared__ T scratch[kWarps];
    return block_reduce<kThreads>(x, op, scratch);
  }

  DF_DEVICE float logit(int64_t i) const {
    return with_format(s_.format, [&](auto element) {
      return static_cast<float>(widen(static_cast<const decltype(element)*>(s_.logits)[offset_ + i]));
    });
  }

  DF_DEVICE int key(int64_t i) const { return keys_ != nullptr ? keys_[i] : key_of(logit(i)); }

  // exp((logit - largest) / temperature) in units of 2^-30.
  DF_DEVICE int weight_of(int key) const {
    const double distance = (static_cast<double>(float_of(key)) - largest_) / s_.temperature;
    return static_cast<int>(rint(exp(distance) * 0x1p30));
  }

  // The largest key t with sum(t) >= goal, where sum falls as t grows, reaches the goal at `low`, and is below it above
  // the largest logit.
  template <typename T, typename Sum>
  DF_DEVICE int last_kept(int64_t low, T goal, const Sum& sum) {
    int64_t high = int64_t{key_of(largest_)} + 1;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (sum(middle) >= goal ? low : high) = middle;
    }
    return static_cast<int>(low);
  }

  const Sample& s_;
  int64_t offset_;
  int *keys_, *weights_;
  float largest_;
  // Codes above this key stay, and those equal to it that come before an index.
  int last_ = key_of(kDropped);
  int64_t end_of_equal_ = s_.codes;
};

__global__ void __launch_bounds__(kThreads) sample_kernel(Sample s, bool in_shared) {
  DF_SHARED(shared);
  int* const keys = in_shared ? reinterpret_cast<int*>(shared) : nullptr;
  Row row(s, keys, in_shared && s.top_p < 1 ? keys + s.codes : nullptr);
  int64_t code = -1;
  if (fabsf(row.load()) <= FLT_MAX) {
    if (s.top_k < s.codes) row.keep_top_k();
    if (s.top_p < 1) row.keep_top_p();
    code = row.draw();
  }
  if (threadIdx.x == 0) s.out[blockIdx.x] = code;
}

}  // namespace

cudaError_t launch_sample(const Sample& params, cudaStream_t stream) {
  int most;
  const cudaError_t error = max_shared_bytes(&most);
  if (error != cudaSuccess) return error;
  const int64_t wanted = params.codes * (params.top_p < 1 ? 2 : 1) * static_cast<int64_t>(sizeof(int));
  const bool in_shared = wanted <= most - kStaticShared;
  return launch(sample_kernel, static_cast<unsigned>(params.rows), kThreads, in_shared ? wanted : 0, stream, params,
                in_shared);
}

}  // namespace dalle_fast
