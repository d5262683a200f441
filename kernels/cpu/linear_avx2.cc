// Panel products with AVX2: half a line of a panel is one vector.
#include <immintrin.h>

#include "kernels/cpu/linear_kernels.h"
#include "kernels/row_planes.h"

namespace shoal {
namespace {

#include "kernels/cpu/linear_isa_avx2.h"

struct Isa : Avx2Operations {
  static constexpr int kSignedShift = 0;
  static I Signed(I x) { return x; }

  // VPMADDUBSW adds two products in 16 bits, saturating. So many of its results (the sum of two
  // products of the largest code with 127) fit in 16 bits together:
  //   codes to 15: 3810, eight; to 31: 7874, four; to 63: 16002, two; signed: 128 * 127 * 2 =
  //   32512, one.
  static constexpr int SumsThatFit(CodeKind kind) {
    return kind == CodeKind::kS8 ? 1 : kind == CodeKind::kU6 ? 2 : kind == CodeKind::kU5 ? 4 : 8;
  }

  static constexpr bool kByLines = true;
  // Lines that are multiplied before their sums are widened, or kept where all fit.
  static constexpr int LinesOfStep(CodeKind kind) {
    return SumsThatFit(kind) == 8 ? 2 : SumsThatFit(kind);
  }
  // Else g++ puts the additions behind all products, which go over the stack.
  static void Settle(I* x) { __asm__("" : "+x"(*x)); }
  static I Add16(I a, I b) { return _mm256_add_epi16(a, b); }
  static I Widen(I a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }

  template <CodeKind kKind, int n>
  static inline __attribute__((always_inline)) I Dot(const I* line, const int8_t* a, I start) {
    constexpr int kRun = SumsThatFit(kKind) < n ? SumsThatFit(kKind) : n;
    const I ones = _mm256_set1_epi16(1);
    for (int g = 0; g < n; g += kRun) {
      I sum = Products<kKind>(line[g], Four(a + 4 * g));
      for (int i = 1; i < kRun; ++i) {
        sum = _mm256_add_epi16(sum, Products<kKind>(line[g + i], Four(a + 4 * (g + i))));
      }
      start = Add32(start, _mm256_madd_epi16(sum, ones));
    }
    return start;
  }
  // Signed weights: |w| times a with w's sign.
  template <CodeKind kKind>
  static I Products(I w, I a) {
    if constexpr (kKind == CodeKind::kS8) {
      return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
    }
    return _mm256_maddubs_epi16(w, a);
  }
};

#include "kernels/cpu/linear_formats.h"
#include "kernels/cpu/linear_simd.h"

constexpr LinearKernels kTable = MakeTable();

}  // namespace

const LinearKernels& Avx2LinearKernels() { return kTable; }

}  // namespace shoal
