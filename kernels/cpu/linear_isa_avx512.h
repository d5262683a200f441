// The 512-bit operations of linear_formats.h and linear_simd.h. Included inside an anonymous
// namespace.

struct Isa {
  static constexpr int kLanes = 16;
  static constexpr int kTileRows = 8, kFloatRows = 8;
  static constexpr bool kPairs = false, kByLines = false;
  static constexpr int kSignedShift = 7;  // VPDPBUSD takes unsigned weights
  using I = __m512i;
  using F = __m512;

  static I Load(const void* p) { return _mm512_loadu_si512(p); }
  static void Store(void* p, I x) { _mm512_storeu_si512(p, x); }
  static I Set8(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
  static I Set32(int32_t v) { return _mm512_set1_epi32(v); }
  static I ZeroI() { return _mm512_setzero_si512(); }
  static I And(I a, I b) { return _mm512_and_si512(a, b); }
  static I Or(I a, I b) { return _mm512_or_si512(a, b); }
  static I Add32(I a, I b) { return _mm512_add_epi32(a, b); }
  static I Sub8(I a, I b) { return _mm512_sub_epi8(a, b); }
  template <int n>
  static I Shr16(I a) {
    return _mm512_srli_epi16(a, n);
  }
  template <int n>
  static I Shl16(I a) {
    return _mm512_slli_epi16(a, n);
  }
  static I Shr32(I a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
  static I Shl32(I a, int n) { return _mm512_slli_epi32(a, static_cast<unsigned>(n)); }
  static F ToFloat(I a) { return _mm512_cvtepi32_ps(a); }
  static I ToInt(F a) { return _mm512_cvtps_epi32(a); }
  static F AsFloat(I a) { return _mm512_castsi512_ps(a); }

  static F Zero() { return _mm512_setzero_ps(); }
  static F Broadcast(float f) { return _mm512_set1_ps(f); }
  static F LoadF(const float* p) { return _mm512_loadu_ps(p); }
  static void StoreF(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F Add(F a, F b) { return _mm512_add_ps(a, b); }
  static F Mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm512_div_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F Max(F a, F b) { return _mm512_max_ps(a, b); }
  static F Min(F a, F b) { return _mm512_min_ps(a, b); }
  static F Abs(F a) { return _mm512_abs_ps(a); }
  static F Round(F a) { return _mm512_roundscale_ps(a, 0); }
  static float MaxLane(F a) { return _mm512_reduce_max_ps(a); }
  // Two columns' activations for lanes that hold two columns of a row.
  static F Pair(const float* p) {
    return _mm512_castpd_ps(
        _mm512_set1_pd(*reinterpret_cast<const double __attribute__((may_alias, aligned(4)))*>(p)));
  }

  static F LoadHalf(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static I WidenU8(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I WidenI8(const uint8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I WidenU16(const uint8_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void StoreInt8(int8_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
  }
  // 2^(e - 128); the two smallest are subnormal.
  static F MxScale(const uint8_t* p) {
    const I e = WidenU8(p);
    const I small = _mm512_sllv_epi32(Set32(0x00200000), e);
    const I normal = _mm512_slli_epi32(_mm512_sub_epi32(e, Set32(1)), 23);
    return AsFloat(_mm512_mask_mov_epi32(normal, _mm512_cmplt_epu32_mask(e, Set32(2)), small));
  }

  template <int v>
  static I AddHi(I x, const uint8_t* bits, int) {
    uint64_t word;  // at any address
    __builtin_memcpy(&word, bits, sizeof word);
    // As _mm512_mask_add_epi8(x, k, x, v), for which g++ 12 copies x first.
    __asm__("vpaddb %2, %0, %0%{%1%}" : "+v"(x) : "Yk"(_cvtu64_mask64(word)), "v"(Set8(v)));
    return x;
  }
  static I Signed(I x) { return _mm512_xor_si512(x, Set8(0x80)); }
  static I Table(const int8_t* levels) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels)));
  }
  static I Lookup(I table, I index) { return _mm512_shuffle_epi8(table, index); }

  // Two chains hide the latency of VPDPBUSD when there is only one row.
  template <CodeKind kKind, int n>
  static inline __attribute__((always_inline)) I Dot(const I* line, const int8_t* a, I start) {
    I even = start, odd = ZeroI();
    for (int g = 0; g < n; g += 2) {
      even = _mm512_dpbusd_epi32(even, line[g], Four(a + 4 * g));
      odd = _mm512_dpbusd_epi32(odd, line[g + 1], Four(a + 4 * g + 4));
    }
    return _mm512_add_epi32(even, odd);
  }
  static I Four(const int8_t* a) {
    return _mm512_set1_epi32(*reinterpret_cast<const int32_t __attribute__((may_alias))*>(a));
  }
};
