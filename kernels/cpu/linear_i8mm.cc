// Panel products with NEON and its matrix products of int8 (I8MM): two rows of activations at a
// time, an odd one with dot products.
#include <arm_neon.h>

#include "kernels/cpu/linear_kernels.h"
#include "kernels/row_planes.h"

namespace shoal {
namespace {

#include "kernels/cpu/linear_isa_neon.h"

struct Isa : NeonOperations {
  static constexpr bool kPairs = true;

  // SMMLA multiplies 2 rows x 8 columns of weights with 2 rows x 8 columns of activations. Lines g
  // and g + 1 are 4 rows x 4 columns each; they become rows 0, 1 and rows 2, 3 of 8 columns.
  static inline __attribute__((always_inline)) void PairLines(I line[8]) {
    for (int g = 0; g < 8; g += 2) {
      const I low = vzip1q_s32(line[g], line[g + 1]);
      line[g + 1] = vzip2q_s32(line[g], line[g + 1]);
      line[g] = low;
    }
  }
  static inline __attribute__((always_inline)) void PairRows(const int8_t* a, const int8_t* b,
                                                             I pair[4]) {
    for (int i = 0; i < 2; ++i) {
      const int64x2_t x = vreinterpretq_s64_s8(vld1q_s8(a + 16 * i));
      const int64x2_t y = vreinterpretq_s64_s8(vld1q_s8(b + 16 * i));
      pair[2 * i] = vreinterpretq_s32_s64(vzip1q_s64(x, y));
      pair[2 * i + 1] = vreinterpretq_s32_s64(vzip2q_s64(x, y));
    }
  }
  template <int n>
  static inline __attribute__((always_inline)) void DotPair(const I* line, const I* pair, I start_a,
                                                            I start_b, I* sum_a, I* sum_b) {
    // [row 0 a, row 0 b, row 1 a, row 1 b]
    I rows01 = vzip1q_s32(start_a, start_b), rows23 = rows01;
    for (int g = 0; g < n; g += 2) {
      rows01 = vmmlaq_s32(rows01, S8(line[g]), S8(pair[g / 2]));
      rows23 = vmmlaq_s32(rows23, S8(line[g + 1]), S8(pair[g / 2]));
    }
    *sum_a = vuzp1q_s32(rows01, rows23);
    *sum_b = vuzp2q_s32(rows01, rows23);
  }
};

#include "kernels/cpu/linear_formats.h"
#include "kernels/cpu/linear_simd.h"

constexpr LinearKernels kTable = MakeTable();

}  // namespace

const LinearKernels& I8mmLinearKernels() { return kTable; }

}  // namespace shoal
