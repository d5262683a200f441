#include "kernels/cuda/linear_half.cuh"

namespace shoal::cuda {

void HalfSuperProduct(const Product& p, const HalfRows& a, Stream stream) {
  switch (p.type) {
    case DType::kQ2_K:
      return LaunchHalf<DType::kQ2_K>(p, a, stream);
    case DType::kQ3_K:
      return LaunchHalf<DType::kQ3_K>(p, a, stream);
    case DType::kQ4_K:
      return LaunchHalf<DType::kQ4_K>(p, a, stream);
    case DType::kQ5_K:
      return LaunchHalf<DType::kQ5_K>(p, a, stream);
    case DType::kQ6_K:
      return LaunchHalf<DType::kQ6_K>(p, a, stream);
    case DType::kIQ4_XS:
      return LaunchHalf<DType::kIQ4_XS>(p, a, stream);
    default:
      return;  // F32 takes f32 rows
  }
}

void UnpackSuperHalves(const PackedMatrix& w, int first, int panels, uint16_t* out, Stream stream) {
  switch (w.shape.type) {
    case DType::kQ2_K:
      return LaunchUnpack<DType::kQ2_K>(w, first, panels, out, stream);
    case DType::kQ3_K:
      return LaunchUnpack<DType::kQ3_K>(w, first, panels, out, stream);
    case DType::kQ4_K:
      return LaunchUnpack<DType::kQ4_K>(w, first, panels, out, stream);
    case DType::kQ5_K:
      return LaunchUnpack<DType::kQ5_K>(w, first, panels, out, stream);
    case DType::kQ6_K:
      return LaunchUnpack<DType::kQ6_K>(w, first, panels, out, stream);
    case DType::kIQ4_XS:
      return LaunchUnpack<DType::kIQ4_XS>(w, first, panels, out, stream);
    default:
      return;
  }
}

}  // namespace shoal::cuda
