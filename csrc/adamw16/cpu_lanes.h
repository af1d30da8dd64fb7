// The update of as many parameters as a register holds, for one instruction set (cpu/each_simd.h). Compilers make
// three times as much of the minima and selects of common/minifloat.h, so only the portable update uses them.

#if DF_VECTOR_BYTES == 16
// Parameters by value: the compiler sees that the stores cannot change them.
inline void update(AdamW16Tensor p, AdamW16Rates rates, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) adamw16_element(rates, p.grad[i], p.param[i], p.mean[i], p.variance[i]);
}
#else
typedef float Floats __attribute__((vector_size(DF_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(DF_VECTOR_BYTES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(DF_VECTOR_BYTES), aligned(4), may_alias));

constexpr int kLanes = DF_VECTOR_BYTES / 4, kParts = kBlock / kLanes;

// 16-bit codes to and from 32-bit lanes. The masks of AVX-512 are full: without them, GCC 12 warns about its
// own headers.
#if DF_VECTOR_BYTES == 64
DF_TARGET DF_ALWAYS_INLINE Integers load_codes(const uint16_t* codes) {
  return reinterpret_cast<Integers>(
      _mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes))));
}
DF_TARGET DF_ALWAYS_INLINE void store_codes(const Integers (&x)[kParts], uint16_t* codes) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes),
                      _mm512_maskz_cvtepi32_epi16(0xFFFF, reinterpret_cast<__m512i>(x[0])));
}
DF_TARGET DF_ALWAYS_INLINE Floats square_root(Floats x) { return _mm512_maskz_sqrt_ps(0xFFFF, x); }
#else
DF_TARGET DF_ALWAYS_INLINE Integers load_codes(const uint16_t* codes) {
  return reinterpret_cast<Integers>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
}
DF_TARGET DF_ALWAYS_INLINE void store_codes(const Integers (&x)[kParts], uint16_t* codes) {
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(x[0]), reinterpret_cast<__m256i>(x[1]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0)));
}
DF_TARGET DF_ALWAYS_INLINE Floats square_root(Floats x) { return _mm256_sqrt_ps(x); }
#endif

// Exponents of the 16-bit formats are biased by 60, those of float32 by 127.
constexpr int32_t kBias = (127 - 60) << 23;

// Two registers, not one and a constant: so compilers recognise the minimum.
DF_TARGET DF_ALWAYS_INLINE Words minimum(Words a, Words b) { return a < b ? a : b; }

// 1-6-9 and 0-6-10, as minifloat_decode, but for -0, which becomes 0.
DF_TARGET DF_ALWAYS_INLINE Floats decode_mean(Integers code) {
  const Integers signed_size = (code << 16 >> 2) & ~0x60000000;  // the sign stays on top
  return reinterpret_cast<Floats>((signed_size + kBias) & ((code & 0x7FFF) != 0));
}
DF_TARGET DF_ALWAYS_INLINE Floats decode_variance(Integers code) {
  return reinterpret_cast<Floats>(((code << 13) + kBias) & (code != 0));
}

// As minifloat_encode: adding half a step rounds away and carries into the exponent, NaN lies above the largest value.
DF_TARGET DF_ALWAYS_INLINE Integers encode_mean(Floats x) {
  constexpr int32_t kLargest = (0x7FFF << 14) + kBias;
  const Words size = minimum(reinterpret_cast<Words>(x) & INT32_MAX, Words{} + kLargest);
  const Integers code = reinterpret_cast<Integers>(size + ((1 << 13) - kBias)) >> 14;
  const Integers sign = (reinterpret_cast<Integers>(x) >> 16 & 0x8000) & (x == x);  // NaN counts as positive
  return (code & (code > 0)) | sign;
}
// For 0 to 5.
DF_TARGET DF_ALWAYS_INLINE Integers encode_variance(Words bits) {
  const Integers code = (reinterpret_cast<Integers>(bits) + ((1 << 12) - kBias)) >> 13;
  return code > 0 ? code : 0;
}

DF_TARGET inline void update(AdamW16Tensor p, AdamW16Rates rates, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; block += kBlock) {
    Integers means[kParts], variances[kParts];
    for (int part = 0; part < kParts; ++part) {
      const int64_t i = block + part * kLanes;
      const Floats grad = *reinterpret_cast<const Floats*>(p.grad + i) * rates.factor;
      Floats mean = decode_mean(load_codes(p.mean + i));
      mean += rates.mean_rate * (grad - mean);
      means[part] = encode_mean(mean);
      const Floats variance =
          decode_variance(load_codes(p.variance + i)) * rates.beta2 + grad * grad * rates.variance_rate;
      // As bits, so that NaN of either sign is above the limit.
      const Words clipped =
          minimum(reinterpret_cast<Words>(variance), reinterpret_cast<Words>(Floats{} + kMaxVariance));
      variances[part] = encode_variance(clipped);
      Floats* param = reinterpret_cast<Floats*>(p.param + i);
      *param =
          *param * rates.decay - mean * rates.step_size / (square_root(reinterpret_cast<Floats>(clipped)) + rates.eps);
    }
    store_codes(means, p.mean + block);
    store_codes(variances, p.variance + block);
  }
}
#endif
