#include "kernels/cuda/linear_int8.cuh"

namespace shoal::cuda {

void Int8SuperProduct(const Product& p, const Int8Rows& a, Stream stream) {
  switch (p.type) {
    case DType::kQ2_K:
      return LaunchInt8<DType::kQ2_K>(p, a, stream);
    case DType::kQ3_K:
      return LaunchInt8<DType::kQ3_K>(p, a, stream);
    case DType::kQ4_K:
      return LaunchInt8<DType::kQ4_K>(p, a, stream);
    case DType::kQ5_K:
      return LaunchInt8<DType::kQ5_K>(p, a, stream);
    case DType::kQ6_K:
      return LaunchInt8<DType::kQ6_K>(p, a, stream);
    case DType::kIQ4_XS:
      return LaunchInt8<DType::kIQ4_XS>(p, a, stream);
    default:
      return;  // the float types have no int8 product
  }
}

}  // namespace shoal::cuda
