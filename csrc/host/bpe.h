// Byte-pair encoding with BPE dropout from a seed (paper section 2.2; Provilkov et al., arXiv 1910.13267).
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace dalle_fast {

// Words and tokens are strings over an alphabet of code points, as the byte-level pre-tokenizer gives them.
class BPE {
 public:
  using Vocab = std::unordered_map<std::u32string, int32_t>;
  using Merges = std::vector<std::pair<std::u32string, std::u32string>>;

  // `merges` in order of rank. Throws std::invalid_argument where a merge uses a token that is not in the vocabulary.
  BPE(const Vocab& vocab, const Merges& merges);

  // Token ids of the words, one after the other. Before each merge every candidate is passed over with probability
  // `dropout`; 0 is plain BPE. The same arguments always give the same ids.
  // Throws std::invalid_argument for a code point outside the alphabet.
  std::vector<int32_t> encode(const std::vector<std::u32string>& words, double dropout, uint64_t seed) const;

 private:
  struct Merge {
    int32_t rank;
    int32_t token;
  };
  struct Random;

  const Merge* find(int32_t left, int32_t right) const;
  void encode_word(const std::u32string& word, double dropout, Random& random, std::vector<int32_t>& out) const;

  std::unordered_map<char32_t, int32_t> alphabet_;
  std::unordered_map<uint64_t, Merge> merges_;  // by the ids of the pair
};

}  // namespace dalle_fast
