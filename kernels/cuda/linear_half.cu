#include "kernels/cuda/linear_half.cuh"

namespace shoal::cuda {

// linear_half_super.cu: the types with super-blocks.
void HalfSuperProduct(const Product& p, const HalfRows& a, Stream stream);
void UnpackSuperHalves(const PackedMatrix& w, int first, int panels, uint16_t* out, Stream stream);

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

void UnpackHalves(const PackedMatrix& w, int first, int panels, uint16_t* out, Stream stream) {
  switch (w.shape.type) {
    case DType::kQ4_0:
      return LaunchUnpack<DType::kQ4_0>(w, first, panels, out, stream);
    case DType::kQ4_1:
      return LaunchUnpack<DType::kQ4_1>(w, first, panels, out, stream);
    case DType::kQ5_0:
      return LaunchUnpack<DType::kQ5_0>(w, first, panels, out, stream);
    case DType::kQ5_1:
      return LaunchUnpack<DType::kQ5_1>(w, first, panels, out, stream);
    case DType::kQ8_0:
      return LaunchUnpack<DType::kQ8_0>(w, first, panels, out, stream);
    case DType::kIQ4_NL:
      return LaunchUnpack<DType::kIQ4_NL>(w, first, panels, out, stream);
    case DType::kMXFP4:
      return LaunchUnpack<DType::kMXFP4>(w, first, panels, out, stream);
    default:
      return UnpackSuperHalves(w, first, panels, out, stream);
  }
}

}  // namespace shoal::cuda
