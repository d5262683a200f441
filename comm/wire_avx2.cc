// Wire conversions with AVX2 and F16C; bit for bit the results of the scalar ones.
#include "comm/wire.h"

#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>

namespace shoal {
namespace wire_internal {

void EncodeQ8Block(const float* in, int64_t count, uint8_t* out);

namespace {

void EncodeF16(const float* in, int64_t count, uint8_t* out) {
  const __m256 max = _mm256_set1_ps(65504.0f);
  const __m256 min = _mm256_set1_ps(-65504.0f);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    // min and max return their second operand when one is NaN, so NaN goes through.
    const __m256 x = _mm256_max_ps(min, _mm256_min_ps(max, _mm256_loadu_ps(in + i)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  if (i < count) ScalarOps().encode_f16(in + i, count - i, out + 2 * i);
}

inline __m256 Load8Halves(const uint8_t* in) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
}

void DecodeF16(const uint8_t* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, Load8Halves(in + 2 * i));
  if (i < count) ScalarOps().decode_f16(in + 2 * i, count - i, out + i);
}

void DecodeAddF16(const uint8_t* in, int64_t count, float* sum) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(sum + i, _mm256_add_ps(_mm256_loadu_ps(sum + i), Load8Halves(in + 2 * i)));
  }
  if (i < count) ScalarOps().decode_add_f16(in + 2 * i, count - i, sum + i);
}

inline float HalfScale(const uint8_t* block) {
  uint16_t half;
  __builtin_memcpy(&half, block, sizeof half);
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
}

inline uint32_t LargestMagnitude(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const __m256i ai = _mm256_castps_si256(_mm256_and_ps(a, mask));
  const __m256i bi = _mm256_castps_si256(_mm256_and_ps(b, mask));
  const __m256i ci = _mm256_castps_si256(_mm256_and_ps(c, mask));
  const __m256i di = _mm256_castps_si256(_mm256_and_ps(d, mask));
  const __m256i m = _mm256_max_epi32(_mm256_max_epi32(ai, bi), _mm256_max_epi32(ci, di));
  __m128i h = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0x4e));
  h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(h));
}

void EncodeQ8(const float* in, int64_t blocks, uint8_t* out) {
  // packs_epi32 and packs_epi16 work within 128-bit halves; this order undoes it.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t n = 0; n < blocks; ++n, in += kWireBlock, out += kQ8BlockBytes) {
    const __m256 a = _mm256_loadu_ps(in), b = _mm256_loadu_ps(in + 8);
    const __m256 c = _mm256_loadu_ps(in + 16), d = _mm256_loadu_ps(in + 24);
    const uint32_t largest = LargestMagnitude(a, b, c, d);
    if (largest >= 0x7f800000u) {
      EncodeQ8Block(in, kWireBlock, out);
      continue;
    }
    float magnitude;
    __builtin_memcpy(&magnitude, &largest, sizeof magnitude);
    float scale = magnitude * (1.0f / 127.0f);
    if (scale > 65504.0f) scale = 65504.0f;
    const uint16_t half = static_cast<uint16_t>(_mm_cvtsi128_si32(
        _mm_cvtps_ph(_mm_set_ss(scale), _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC)));
    __builtin_memcpy(out, &half, sizeof half);
    const __m256 inverse = _mm256_set1_ps(half == 0 ? 0.0f : 1.0f / HalfScale(out));
    const __m256 low = _mm256_set1_ps(-127.0f), high = _mm256_set1_ps(127.0f);
    const auto quantize = [&](__m256 x) __attribute__((always_inline)) {
      const __m256 y = _mm256_mul_ps(x, inverse);
      return _mm256_cvtps_epi32(_mm256_max_ps(low, _mm256_min_ps(high, y)));
    };
    const __m256i ab = _mm256_packs_epi32(quantize(a), quantize(b));
    const __m256i cd = _mm256_packs_epi32(quantize(c), quantize(d));
    const __m256i q = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 2), q);
  }
}

inline __m256 Load8Q8(const uint8_t* in, __m256 d) {
  const __m128i q = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in));
  return _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)));
}

void DecodeQ8(const uint8_t* in, int64_t blocks, float* out) {
  for (int64_t n = 0; n < blocks; ++n, in += kQ8BlockBytes, out += kWireBlock) {
    const __m256 d = _mm256_set1_ps(HalfScale(in));
    for (int i = 0; i < kWireBlock; i += 8) _mm256_storeu_ps(out + i, Load8Q8(in + 2 + i, d));
  }
}

void DecodeAddQ8(const uint8_t* in, int64_t blocks, float* sum) {
  for (int64_t n = 0; n < blocks; ++n, in += kQ8BlockBytes, sum += kWireBlock) {
    const __m256 d = _mm256_set1_ps(HalfScale(in));
    for (int i = 0; i < kWireBlock; i += 8) {
      const __m256 x = Load8Q8(in + 2 + i, d);
      _mm256_storeu_ps(sum + i, _mm256_add_ps(_mm256_loadu_ps(sum + i), x));
    }
  }
}

constexpr Ops kOps = {EncodeF16, DecodeF16, DecodeAddF16, EncodeQ8, DecodeQ8, DecodeAddQ8};

}  // namespace

const Ops* Avx2Ops() { return &kOps; }

}  // namespace wire_internal
}  // namespace shoal

#else

namespace shoal::wire_internal {
const Ops* Avx2Ops() { return nullptr; }
}  // namespace shoal::wire_internal

#endif
