#include "kernels/cuda/linear_int8.cuh"

namespace shoal::cuda {

// linear_int8_super.cu: the types with super-blocks.
void Int8SuperProduct(const Product& p, const Int8Rows& a, Stream stream);

void Int8Product(const Product& p, const Int8Rows& a, Stream stream) {
  switch (p.type) {
    case DType::kQ4_0:
      return LaunchInt8<DType::kQ4_0>(p, a, stream);
    case DType::kQ4_1:
      return LaunchInt8<DType::kQ4_1>(p, a, stream);
    case DType::kQ5_0:
      return LaunchInt8<DType::kQ5_0>(p, a, stream);
    case DType::kQ5_1:
      return LaunchInt8<DType::kQ5_1>(p, a, stream);
    case DType::kQ8_0:
      return LaunchInt8<DType::kQ8_0>(p, a, stream);
    case DType::kIQ4_NL:
      return LaunchInt8<DType::kIQ4_NL>(p, a, stream);
    case DType::kMXFP4:
      return LaunchInt8<DType::kMXFP4>(p, a, stream);
    default:
      return Int8SuperProduct(p, a, stream);
  }
}

}  // namespace shoal::cuda
