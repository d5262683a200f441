// Attention on AVX-512: vectors of 16 floats, 32 registers.
#include <immintrin.h>

#include "kernels/cpu/attention_kernels.h"

namespace shoal {
namespace {

using Vec = __m512;
constexpr int kLanes = 16;
constexpr int kScoreTile = 16;    // accumulators of a score tile
constexpr int kScoreQueries = 8;  // most queries of a score tile
constexpr int kOutputVecs = 4;    // vectors of dims of an output tile of 4 queries

inline Vec Set(float x) { return _mm512_set1_ps(x); }
inline Vec Add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec Sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec Mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec Max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec Fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec Round(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec ScaleByPowerOf2(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
inline Vec KeepWhereAbove(Vec x, Vec limit, Vec y) {  // else 0
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_GT_OQ), y);
}
inline float ReduceSum(Vec x) { return _mm512_reduce_add_ps(x); }
inline float ReduceMax(Vec x) { return _mm512_reduce_max_ps(x); }
inline void Store(float* p, Vec x) { _mm512_storeu_ps(p, x); }

inline Vec LoadF32(const float* p) { return _mm512_loadu_ps(p); }
inline Vec LoadF16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec LoadI8(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

// The first n elements, zeros after them; reads no byte beyond.
inline __mmask16 First(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec LoadFirstF32(const float* p, int n) { return _mm512_maskz_loadu_ps(First(n), p); }
inline Vec LoadFirstF16(const uint16_t* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(First(n), p));
}
inline Vec LoadFirstI8(const int8_t* p, int n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(First(n), p)));
}

inline void StoreF16(uint16_t* p, Vec x) {
  const Vec limited = _mm512_min_ps(_mm512_max_ps(x, Set(-65504)), Set(65504));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(limited, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

}  // namespace
}  // namespace shoal

#include "kernels/cpu/attention_vector_inl.h"

namespace shoal {

const AttentionKernels& Avx512AttentionKernels() { return kVectorKernels; }

}  // namespace shoal
