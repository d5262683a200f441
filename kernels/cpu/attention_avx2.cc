// Attention on AVX2, FMA and F16C: vectors of 8 floats, 16 registers.
#include <immintrin.h>

#include "kernels/cpu/attention_kernels.h"

namespace shoal {
namespace {

using Vec = __m256;
constexpr int kLanes = 8;
constexpr int kScoreTile = 8;     // accumulators of a score tile
constexpr int kScoreQueries = 4;  // most queries of a score tile
constexpr int kOutputVecs = 2;    // vectors of dims of an output tile of 4 queries

inline Vec Set(float x) { return _mm256_set1_ps(x); }
inline Vec Add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec Sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec Mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec Max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec Fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec Round(Vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void Store(float* p, Vec x) { _mm256_storeu_ps(p, x); }

inline Vec LoadF32(const float* p) { return _mm256_loadu_ps(p); }
inline Vec LoadF16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec LoadI8(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

// The first n elements, zeros after them; reads no byte beyond.
inline Vec LoadFirstF32(const float* p, int n) {
  float x[kLanes] = {};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return LoadF32(x);
}
inline Vec LoadFirstF16(const uint16_t* p, int n) {
  uint16_t x[kLanes] = {};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return LoadF16(x);
}
inline Vec LoadFirstI8(const int8_t* p, int n) {
  int8_t x[kLanes] = {};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return LoadI8(x);
}

inline void StoreF16(uint16_t* p, Vec x) {
  const Vec limited = _mm256_min_ps(_mm256_max_ps(x, Set(-65504)), Set(65504));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(limited, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline Vec ScaleByPowerOf2(Vec x, Vec n) {  // n in [-126, 127]
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return Mul(x, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}
inline Vec KeepWhereAbove(Vec x, Vec limit, Vec y) {  // else 0
  return _mm256_and_ps(_mm256_cmp_ps(x, limit, _CMP_GT_OQ), y);
}

inline float ReduceSum(Vec x) {
  const __m128 a = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 b = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
inline float ReduceMax(Vec x) {
  const __m128 a = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 b = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}

}  // namespace
}  // namespace shoal

#include "kernels/cpu/attention_vector_inl.h"

namespace shoal {

const AttentionKernels& Avx2AttentionKernels() { return kVectorKernels; }

}  // namespace shoal
