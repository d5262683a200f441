#include "kernels/cuda/linear_float.cuh"

namespace shoal::cuda {

void FloatProduct(const Product& p, const FloatRows& a, Stream stream) {
  switch (p.type) {
    case DType::kF32:
      return LaunchFloat<DType::kF32>(p, a, stream);
    case DType::kF16:
      return LaunchFloat<DType::kF16>(p, a, stream);
    case DType::kBF16:
      return LaunchFloat<DType::kBF16>(p, a, stream);
    default:
      return;  // quantized types take int8 or f16 rows
  }
}

}  // namespace shoal::cuda
