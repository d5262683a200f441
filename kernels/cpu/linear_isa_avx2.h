// The 256-bit operations that AVX2 and AVX-VNNI have in common. Included inside an anonymous
// namespace by both (see linear_simd.h); they differ in how they take dot products.

struct Avx2Operations {
  static constexpr int kLanes = 8;
  static constexpr int kTileRows = 4, kFloatRows = 4;
  static constexpr bool kPairs = false;
  using I = __m256i;
  using F = __m256;

  static I Load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void Store(void* p, I x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
  static I Set8(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
  static I Set32(int32_t v) { return _mm256_set1_epi32(v); }
  static I ZeroI() { return _mm256_setzero_si256(); }
  static I And(I a, I b) { return _mm256_and_si256(a, b); }
  static I Or(I a, I b) { return _mm256_or_si256(a, b); }
  static I Add32(I a, I b) { return _mm256_add_epi32(a, b); }
  static I Sub8(I a, I b) { return _mm256_sub_epi8(a, b); }
  template <int n>
  static I Shr16(I a) {
    return _mm256_srli_epi16(a, n);
  }
  template <int n>
  static I Shl16(I a) {
    return _mm256_slli_epi16(a, n);
  }
  static I Shr32(I a, int n) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(n)); }
  static I Shl32(I a, int n) { return _mm256_slli_epi32(a, n); }
  static F ToFloat(I a) { return _mm256_cvtepi32_ps(a); }
  static I ToInt(F a) { return _mm256_cvtps_epi32(a); }
  static F AsFloat(I a) { return _mm256_castsi256_ps(a); }

  static F Zero() { return _mm256_setzero_ps(); }
  static F Broadcast(float f) { return _mm256_set1_ps(f); }
  static F LoadF(const float* p) { return _mm256_loadu_ps(p); }
  static void StoreF(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F Add(F a, F b) { return _mm256_add_ps(a, b); }
  static F Mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm256_div_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F Max(F a, F b) { return _mm256_max_ps(a, b); }
  static F Min(F a, F b) { return _mm256_min_ps(a, b); }
  static F Abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static F Round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static float MaxLane(F a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  static F Pair(const float* p) {
    return _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(p)));
  }

  static F LoadHalf(const uint8_t* p) { return _mm256_cvtph_ps(Load128(p)); }
  static I WidenU8(const uint8_t* p) { return _mm256_cvtepu8_epi32(Load64(p)); }
  static I WidenI8(const uint8_t* p) { return _mm256_cvtepi8_epi32(Load64(p)); }
  static I WidenU16(const uint8_t* p) { return _mm256_cvtepu16_epi32(Load128(p)); }
  static void StoreInt8(int8_t* p, F x) {
    const I i = _mm256_cvtps_epi32(x);
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }
  // 2^(e - 128); the two smallest are subnormal.
  static F MxScale(const uint8_t* p) {
    const I e = WidenU8(p);
    const I small = _mm256_sllv_epi32(Set32(0x00200000), e);
    const I normal = _mm256_slli_epi32(_mm256_sub_epi32(e, Set32(1)), 23);
    return AsFloat(_mm256_blendv_epi8(normal, small, _mm256_cmpgt_epi32(Set32(2), e)));
  }

  // 32 bits become 32 bytes: each byte picks its byte of the mask, then its bit, which gives v the
  // sign of what is left: none, or its own. The byte with bit 7, a negative number, gets -(-v).
  template <int v>
  static I AddHi(I x, const uint8_t* bits, int part) {
    static_assert(v > 0 && v < 128);
    constexpr uint64_t kValues =
        (uint64_t{256 - v} << 56) | (0x01010101010101 * static_cast<uint64_t>(v));
    const I word = _mm256_set1_epi32(LoadInt(bits + 4 * part));
    const I pick = _mm256_setr_epi64x(0x0000000000000000, 0x0101010101010101, 0x0202020202020202,
                                      0x0303030303030303);
    const I bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
    const I left = And(_mm256_shuffle_epi8(word, pick), bit);
    return Or(x, _mm256_sign_epi8(_mm256_set1_epi64x(static_cast<int64_t>(kValues)), left));
  }
  static I Table(const int8_t* levels) { return _mm256_broadcastsi128_si256(Load128(levels)); }
  static I Lookup(I table, I index) { return _mm256_shuffle_epi8(table, index); }

  static __m128i Load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static __m128i Load64(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
  static int32_t LoadInt(const void* p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return v;
  }
  // Four activations in every lane.
  static I Four(const int8_t* a) { return _mm256_set1_epi32(LoadInt(a)); }
};
