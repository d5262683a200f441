// Panel products with AVX-512 VNNI: a line of a panel is one vector.
#include <immintrin.h>

#include "kernels/cpu/linear_kernels.h"
#include "kernels/row_planes.h"

namespace shoal {
namespace {

#include "kernels/cpu/linear_isa_avx512.h"

#include "kernels/cpu/linear_formats.h"
#include "kernels/cpu/linear_simd.h"

constexpr LinearKernels kTable = MakeTable();

}  // namespace

const LinearKernels& Avx512LinearKernels() { return kTable; }

}  // namespace shoal
