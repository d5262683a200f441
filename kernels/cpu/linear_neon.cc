// Panel products with NEON and its dot products (Armv8.2 DotProd): a quarter of a line is one
// vector.
#include <arm_neon.h>

#include "kernels/cpu/linear_kernels.h"
#include "kernels/row_planes.h"

namespace shoal {
namespace {

#include "kernels/cpu/linear_isa_neon.h"

using Isa = NeonOperations;

#include "kernels/cpu/linear_formats.h"
#include "kernels/cpu/linear_simd.h"

constexpr LinearKernels kTable = MakeTable();

}  // namespace

const LinearKernels& NeonLinearKernels() { return kTable; }

}  // namespace shoal
