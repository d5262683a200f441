// The 128-bit operations that the levels neon and i8mm have in common. Included inside an anonymous
// namespace by both (see linear_simd.h). A vector is 4 rows of a line.

struct NeonOperations {
  static constexpr int kLanes = 4;
  // The four vectors of a line take turns, so that accumulators of many rows are in L1 between;
  // products of floats do too little with each for that.
  static constexpr int kTileRows = 8, kFloatRows = 4;
  static constexpr int kSignedShift = 0;  // SDOT takes signed weights
  static constexpr bool kPairs = false, kByLines = false;
  using I = int32x4_t;
  using F = float32x4_t;

  static I Load(const void* p) {
    return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
  }
  static void Store(void* p, I x) { vst1q_u8(static_cast<uint8_t*>(p), U8(x)); }
  static I Set8(int v) { return vreinterpretq_s32_s8(vdupq_n_s8(static_cast<int8_t>(v))); }
  static I Set32(int32_t v) { return vdupq_n_s32(v); }
  static I ZeroI() { return vdupq_n_s32(0); }
  static I And(I a, I b) { return vandq_s32(a, b); }
  static I Or(I a, I b) { return vorrq_s32(a, b); }
  static I Add32(I a, I b) { return vaddq_s32(a, b); }
  static I Sub8(I a, I b) { return vreinterpretq_s32_s8(vsubq_s8(S8(a), S8(b))); }
  template <int n>
  static I Shr16(I a) {
    return vreinterpretq_s32_u16(vshrq_n_u16(vreinterpretq_u16_s32(a), n));
  }
  template <int n>
  static I Shl16(I a) {
    return vreinterpretq_s32_u16(vshlq_n_u16(vreinterpretq_u16_s32(a), n));
  }
  static I Shr32(I a, int n) {
    return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vdupq_n_s32(-n)));
  }
  static I Shl32(I a, int n) { return vshlq_s32(a, vdupq_n_s32(n)); }
  static F ToFloat(I a) { return vcvtq_f32_s32(a); }
  static I ToInt(F a) { return vcvtnq_s32_f32(a); }
  static F AsFloat(I a) { return vreinterpretq_f32_s32(a); }

  static F Zero() { return vdupq_n_f32(0); }
  static F Broadcast(float f) { return vdupq_n_f32(f); }
  static F LoadF(const float* p) { return vld1q_f32(p); }
  static void StoreF(float* p, F x) { vst1q_f32(p, x); }
  static F Add(F a, F b) { return vaddq_f32(a, b); }
  static F Mul(F a, F b) { return vmulq_f32(a, b); }
  static F Div(F a, F b) { return vdivq_f32(a, b); }
  static F Fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F Max(F a, F b) { return vmaxq_f32(a, b); }
  static F Min(F a, F b) { return vminq_f32(a, b); }
  static F Abs(F a) { return vabsq_f32(a); }
  static F Round(F a) { return vrndnq_f32(a); }
  static float MaxLane(F a) { return vmaxvq_f32(a); }
  static F Pair(const float* p) {
    const float32x2_t x = vld1_f32(p);
    return vcombine_f32(x, x);
  }

  static F LoadHalf(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
  static I WidenU8(const uint8_t* p) {
    const uint16x8_t x = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(LoadWord(p))));
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(x)));
  }
  static I WidenI8(const uint8_t* p) {
    const int16x8_t x = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(LoadWord(p))));
    return vmovl_s16(vget_low_s16(x));
  }
  static I WidenU16(const uint8_t* p) {
    return vreinterpretq_s32_u32(vmovl_u16(vreinterpret_u16_u8(vld1_u8(p))));
  }
  static void StoreInt8(int8_t* p, F x) {
    const int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(x));
    const int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
    const uint32_t v = vget_lane_u32(vreinterpret_u32_s8(bytes), 0);
    __builtin_memcpy(p, &v, 4);
  }
  // 2^(e - 128); the two smallest are subnormal.
  static F MxScale(const uint8_t* p) {
    const I e = WidenU8(p);
    const uint32x4_t small = vshlq_u32(vdupq_n_u32(0x00200000), e);
    const int32x4_t normal = vshlq_n_s32(vsubq_s32(e, Set32(1)), 23);
    return AsFloat(vbslq_s32(vcltq_s32(e, Set32(2)), vreinterpretq_s32_u32(small), normal));
  }

  // 16 bits become 16 bytes: each byte picks its byte of the mask, then its bit.
  template <int v>
  static I AddHi(I x, const uint8_t* bits, int part) {
    const uint8x16_t pick = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    const uint8x16_t bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    uint16_t word;
    __builtin_memcpy(&word, bits + 2 * part, 2);
    const uint8x16_t bytes = vqtbl1q_u8(vreinterpretq_u8_u16(vdupq_n_u16(word)), pick);
    return Or(x, And(vreinterpretq_s32_u8(vtstq_u8(bytes, bit)), Set8(v)));
  }
  static I Signed(I x) { return x; }
  static I Table(const int8_t* levels) { return vreinterpretq_s32_s8(vld1q_s8(levels)); }
  static I Lookup(I table, I index) {
    return vreinterpretq_s32_s8(vqtbl1q_s8(S8(table), U8(index)));
  }

  template <CodeKind kKind, int n>
  static inline __attribute__((always_inline)) I Dot(const I* line, const int8_t* a, I start) {
    for (int g = 0; g < n; g += 4) {
      const int8x16_t x = vld1q_s8(a + 4 * g);
      start = vdotq_laneq_s32(start, S8(line[g]), x, 0);
      start = vdotq_laneq_s32(start, S8(line[g + 1]), x, 1);
      start = vdotq_laneq_s32(start, S8(line[g + 2]), x, 2);
      start = vdotq_laneq_s32(start, S8(line[g + 3]), x, 3);
    }
    return start;
  }

  static int8x16_t S8(I x) { return vreinterpretq_s8_s32(x); }
  static uint8x16_t U8(I x) { return vreinterpretq_u8_s32(x); }
  static uint32_t LoadWord(const void* p) {
    uint32_t v;
    __builtin_memcpy(&v, p, 4);
    return v;
  }
};
