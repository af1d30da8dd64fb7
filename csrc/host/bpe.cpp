// A word is a linked list of tokens; the merges that its neighbours allow wait in a heap, lowest rank first, then
// leftmost. So a word of n characters costs n log n even when a caption is one endless word.
#include "host/bpe.h"

#include <functional>
#include <queue>
#include <stdexcept>
#include <tuple>

namespace dalle_fast {
namespace {

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

struct Node {
  int32_t token;
  int prev;  // positions in the word; -1 at the ends
  int next;
  bool merged_away;
};

struct Candidate {
  int32_t rank;
  int left;  // position of the pair's left token
  int32_t left_token;
  int32_t right_token;
  int32_t token;  // that the pair becomes

  bool operator>(const Candidate& other) const { return std::tie(rank, left) > std::tie(other.rank, other.left); }
};

}  // namespace

// splitmix64: draw i is a hash of seed + i * constant, so neighbouring seeds are as good as distant ones.
struct BPE::Random {
  uint64_t state;

  double uniform() {  // [0, 1), 53 bits
    uint64_t z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
  }
};

BPE::BPE(const Vocab& vocab, const Merges& merges) {
  const auto id = [&vocab](const std::u32string& token) {
    const auto it = vocab.find(token);
    if (it == vocab.end()) throw std::invalid_argument("merges: expected tokens of the vocabulary, got another");
    return it->second;
  };
  for (const auto& [token, token_id] : vocab) {
    if (token.size() == 1) alphabet_[token[0]] = token_id;
  }
  int32_t rank = 0;
  for (const auto& [left, right] : merges) {
    merges_.emplace(pair_key(id(left), id(right)), Merge{rank++, id(left + right)});
  }
}

const BPE::Merge* BPE::find(int32_t left, int32_t right) const {
  const auto it = merges_.find(pair_key(left, right));
  return it == merges_.end() ? nullptr : &it->second;
}

void BPE::encode_word(const std::u32string& word, double dropout, Random& random, std::vector<int32_t>& out) const {
  const int length = static_cast<int>(word.size());
  std::vector<Node> nodes;
  nodes.reserve(word.size());
  for (int i = 0; i < length; ++i) {
    const auto it = alphabet_.find(word[i]);
    if (it == alphabet_.end()) throw std::invalid_argument("words: expected byte-level characters, got another");
    nodes.push_back({it->second, i - 1, i + 1 < length ? i + 1 : -1, false});
  }

  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> candidates;
  const auto push = [&](int left) {
    if (left < 0 || nodes[left].next < 0) return;
    const int32_t left_token = nodes[left].token;
    const int32_t right_token = nodes[nodes[left].next].token;
    if (const Merge* merge = find(left_token, right_token)) {
      candidates.push({merge->rank, left, left_token, right_token, merge->token});
    }
  };
  for (int i = 0; i < length; ++i) push(i);

  std::vector<Candidate> passed_over;  // by dropout, until the next merge happens
  while (!candidates.empty()) {
    const Candidate best = candidates.top();
    candidates.pop();
    Node& node = nodes[best.left];
    const bool stale = node.merged_away || node.token != best.left_token || node.next < 0 ||
                       nodes[node.next].token != best.right_token;
    if (stale) continue;
    if (dropout > 0 && random.uniform() < dropout) {
      passed_over.push_back(best);
      continue;
    }
    Node& right = nodes[node.next];
    right.merged_away = true;
    node.token = best.token;
    node.next = right.next;
    if (node.next >= 0) nodes[node.next].prev = best.left;
    push(node.prev);
    push(best.left);
    for (const Candidate& candidate : passed_over) candidates.push(candidate);
    passed_over.clear();
  }

  for (int i = length > 0 ? 0 : -1; i >= 0; i = nodes[i].next) out.push_back(nodes[i].token);
}

std::vector<int32_t> BPE::encode(const std::vector<std::u32string>& words, double dropout, uint64_t seed) const {
  if (!(dropout >= 0 && dropout <= 1)) {
    throw std::invalid_argument("dropout: expected a probability, got " + std::to_string(dropout));
  }
  Random random{seed};
  std::vector<int32_t> tokens;
  for (const std::u32string& word : words) encode_word(word, dropout, random, tokens);
  return tokens;
}

}  // namespace dalle_fast
