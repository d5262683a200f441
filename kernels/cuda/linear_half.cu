#include "kernels/cuda/linear_half.cuh"

namespace shoal::cuda {

// linear_half_super.cu: the types with super-blocks.
void HalfSuperProduct(const Product& p, const HalfRows& a, Stream stream);

void HalfProduct(const Product& p, const HalfRows& a, Stream stream) {
  switch (p.type) {
    case DType::kF16:
      return LaunchHalf<DType::kF16>(p, a, stream);
    case DType::kBF16:
      return LaunchHalf<DType::kBF16>(p, a, stream);
    case DType::kQ4_0:
      return LaunchHalf<DType::kQ4_0>(p, a, stream);
    case DType::kQ4_1:
      return LaunchHalf<DType::kQ4_1>(p, a, stream);
    case DType::kQ5_0:
      return LaunchHalf<DType::kQ5_0>(p, a, stream);
    case DType::kQ5_1:
      return LaunchHalf<DType::kQ5_1>(p, a, stream);
    case DType::kQ8_0:
      return LaunchHalf<DType::kQ8_0>(p, a, stream);
    case DType::kIQ4_NL:
      return LaunchHalf<DType::kIQ4_NL>(p, a, stream);
    case DType::kMXFP4:
      return LaunchHalf<DType::kMXFP4>(p, a, stream);
    default:
      return HalfSuperProduct(p, a, stream);
  }
}

}  // namespace shoal::cuda
