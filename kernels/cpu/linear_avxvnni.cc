// Panel products with AVX-VNNI, the 256-bit VPDPBUSD of CPUs that lack AVX-512.
#include <immintrin.h>

#include "kernels/cpu/linear_kernels.h"
#include "kernels/row_planes.h"

namespace shoal {
namespace {

#include "kernels/cpu/linear_isa_avx2.h"

struct Isa : Avx2Operations {
  static constexpr bool kByLines = false;
  static constexpr int kSignedShift = 7;  // VPDPBUSD takes unsigned weights
  static I Signed(I x) { return _mm256_xor_si256(x, Set8(0x80)); }

  template <CodeKind kKind, int n>
  static inline __attribute__((always_inline)) I Dot(const I* line, const int8_t* a, I start) {
    I even = start, odd = ZeroI();
    for (int g = 0; g < n; g += 2) {
      even = _mm256_dpbusd_avx_epi32(even, line[g], Four(a + 4 * g));
      odd = _mm256_dpbusd_avx_epi32(odd, line[g + 1], Four(a + 4 * g + 4));
    }
    return Add32(even, odd);
  }
};

#include "kernels/cpu/linear_formats.h"
#include "kernels/cpu/linear_simd.h"

constexpr LinearKernels kTable = MakeTable();

}  // namespace

const LinearKernels& AvxVnniLinearKernels() { return kTable; }

}  // namespace shoal
