// Attention on NEON: vectors of 4 floats, 32 registers.
#include <arm_neon.h>

#include "kernels/cpu/attention_kernels.h"

namespace shoal {
namespace {

using Vec = float32x4_t;
constexpr int kLanes = 4;
constexpr int kScoreTile = 16;    // accumulators of a score tile
constexpr int kScoreQueries = 4;  // most queries of a score tile
constexpr int kOutputVecs = 4;    // vectors of dims of an output tile of 4 queries

inline Vec Set(float x) { return vdupq_n_f32(x); }
inline Vec Add(Vec a, Vec b) { return vaddq_f32(a, b); }
inline Vec Sub(Vec a, Vec b) { return vsubq_f32(a, b); }
inline Vec Mul(Vec a, Vec b) { return vmulq_f32(a, b); }
inline Vec Max(Vec a, Vec b) { return vmaxq_f32(a, b); }
inline Vec Fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
inline Vec Round(Vec x) { return vrndnq_f32(x); }
inline void Store(float* p, Vec x) { vst1q_f32(p, x); }

inline Vec LoadF32(const float* p) { return vld1q_f32(p); }
inline Vec LoadF16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline Vec LoadI8(const int8_t* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, 4);
  const int16x8_t x = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(word)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(x)));
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
  const Vec limited = vminq_f32(vmaxq_f32(x, Set(-65504)), Set(65504));
  vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(limited)));
}

inline Vec ScaleByPowerOf2(Vec x, Vec n) {  // n in [-126, 127]
  const int32x4_t biased = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
  return Mul(x, vreinterpretq_f32_s32(vshlq_n_s32(biased, 23)));
}
inline Vec KeepWhereAbove(Vec x, Vec limit, Vec y) {  // else 0
  return vreinterpretq_f32_u32(vandq_u32(vcgtq_f32(x, limit), vreinterpretq_u32_f32(y)));
}

inline float ReduceSum(Vec x) { return vaddvq_f32(x); }
inline float ReduceMax(Vec x) { return vmaxvq_f32(x); }

}  // namespace
}  // namespace shoal

#include "kernels/cpu/attention_vector_inl.h"

namespace shoal {

const AttentionKernels& NeonAttentionKernels() { return kVectorKernels; }

}  // namespace shoal
