// Philox words, four blocks per register with AVX2, and the uniform and Gumbel numbers made of them.
#include "cpu/noise.h"

#include <algorithm>

#include "cpu/simd.h"
#include "cpu/vec_math.h"

#ifdef DF_X86
#include <immintrin.h>
#endif

namespace dalle_fast {
namespace {

constexpr int kRegisters = 4;            // of four blocks each, drawn at once
constexpr int kBlocks = 4 * kRegisters;  // of four words
constexpr int64_t kWords = 4 * kBlocks;

void draw_blocks(uint64_t seed, uint64_t block, int64_t blocks, uint32_t* words) {
  for (int64_t i = 0; i < blocks; ++i) {
    const PhiloxWords drawn = philox(seed, block + i);
    std::copy(drawn.word, drawn.word + 4, words + 4 * i);
  }
}

#ifdef DF_X86
// Four blocks per register, each word in the low half of a 64-bit lane, where vpmuludq wants it: compilers do not find
// this form of the widening product. Several registers in flight hide its latency.
DF_AVX2 void draw_blocks_avx2(uint64_t seed, uint64_t block, int64_t blocks, uint32_t* words) {
  const __m256i mul0 = _mm256_set1_epi64x(0xD2511F53u), mul1 = _mm256_set1_epi64x(0xCD9E8D57u);
  for (int64_t i = 0; i < blocks; i += kBlocks) {
    __m256i c0[kRegisters], c1[kRegisters], c2[kRegisters], c3[kRegisters];
    for (int h = 0; h < kRegisters; ++h) {
      c0[h] =
          _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(block + i + 4 * h)), _mm256_setr_epi64x(0, 1, 2, 3));
      c1[h] = _mm256_srli_epi64(c0[h], 32);
      c2[h] = c3[h] = _mm256_setzero_si256();
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
      for (int h = 0; h < kRegisters; ++h) {
        const __m256i a = _mm256_mul_epu32(c0[h], mul0), b = _mm256_mul_epu32(c2[h], mul1);
        c0[h] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(b, 32), c1[h]), key0);
        c2[h] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(a, 32), c3[h]), key1);
        c1[h] = b;
        c3[h] = a;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int h = 0; h < kRegisters; ++h) {
      const __m256i low = _mm256_blend_epi32(c0[h], _mm256_slli_epi64(c1[h], 32), 0xAA);   // words 0, 1 of each block
      const __m256i high = _mm256_blend_epi32(c2[h], _mm256_slli_epi64(c3[h], 32), 0xAA);  // words 2, 3
      const __m256i even = _mm256_unpacklo_epi64(low, high), odd = _mm256_unpackhi_epi64(low, high);
      auto* out = reinterpret_cast<__m256i*>(words + 4 * i + 16 * h);
      _mm256_storeu_si256(out, _mm256_permute2x128_si256(even, odd, 0x20));
      _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(even, odd, 0x31));
    }
  }
}
#endif

// Calls convert(words, count, out) for pieces of the elements.
template <typename Convert>
void convert_words(uint64_t seed, int64_t first, int64_t n, float* out, Convert convert) {
  constexpr int64_t kPiece = 16 * kWords;
  uint32_t words[kPiece];
  for (int64_t done = 0; done < n; done += kPiece) {
    const int64_t count = std::min(n - done, kPiece);
    random_words(seed, first + done, count, words);
    convert(words, count, out + done);
  }
}

}  // namespace

void random_words(uint64_t seed, int64_t first, int64_t n, uint32_t* out) {
#ifdef DF_X86
  static const auto draw = simd_level() >= Simd::kAvx2 ? draw_blocks_avx2 : draw_blocks;
#else
  constexpr auto draw = draw_blocks;
#endif
  int64_t done = 0;
  if (first % 4 == 0) {  // whole groups of blocks go straight to `out`
    done = n / kWords * kWords;
    draw(seed, static_cast<uint64_t>(first / 4), done / 4, out);
  }
  while (done < n) {
    uint32_t words[kWords];
    const int64_t skip = (first + done) % 4;  // words of the first block that belong to earlier elements
    const int64_t count = std::min(n - done, kWords - skip);
    draw(seed, static_cast<uint64_t>((first + done) / 4), kBlocks, words);
    std::copy_n(words + skip, count, out + done);
    done += count;
  }
}

void uniform_noise_cpu(uint64_t seed, int64_t first, int64_t n, float* out) {
  convert_words(seed, first, n, out, [](const uint32_t* words, int64_t count, float* to) {
    simd([=]() DF_INLINE_LAMBDA {
      for (int64_t i = 0; i < count; ++i) to[i] = uniform_from_word(words[i]);
    });
  });
}

void gumbel_noise_cpu(uint64_t seed, int64_t first, int64_t n, float* out) {
  convert_words(seed, first, n, out, [](const uint32_t* words, int64_t count, float* to) {
    simd([=]() DF_INLINE_LAMBDA {
      for (int64_t i = 0; i < count; ++i) to[i] = gumbel_from_word(words[i]);
    });
  });
}

}  // namespace dalle_fast
