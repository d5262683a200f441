// Panel products without vector instructions: the oracle of the others, and what runs on any
// machine.
#include <algorithm>
#include <cmath>

#include "kernels/cpu/linear_kernels.h"
#include "kernels/row_planes.h"

namespace shoal {
namespace {

// Sums of a sub-block's levels with 32 activations, one for each half.
void Dot(const SubBlockValues& w, const Q8Block& a, int32_t sum[2]) {
  for (int half = 0; half < 2; ++half) {
    int32_t s = 0;
    for (int i = 16 * half; i < 16 * half + 16; ++i) s += w.level[i] * a.q[i];
    sum[half] = s;
  }
}

void Product(const PackedShape& shape, const uint8_t* panel, const Q8Block* const* rows, int m,
             float* tile) {
  std::fill(tile, tile + kPanelRows * m, 0.0f);
  const PlaneInfo& info = Planes(shape.type);
  const uint8_t* p = panel;
  const uint8_t* header = panel;
  int s = shape.lead;
  for (int64_t i = 0; i < shape.cols / 32; ++i, s = info.super ? (s + 1) % 8 : 0) {
    if (i == 0 || s == 0) {
      header = p;
      p += info.header_bytes() * kPanelRows;
    }
    for (int lane = 0; lane < kPanelRows; ++lane) {
      SubBlockValues w;
      DecodePackedSubBlock(shape.type, header, p, lane, s, &w);
      for (int r = 0; r < m; ++r) {
        const Q8Block& a = rows[r][i];
        int32_t sum[2];
        Dot(w, a, sum);
        for (int half = 0; half < 2; ++half) {
          tile[kPanelRows * r + lane] += w.scale[half] * static_cast<float>(sum[half]) * a.scale +
                                         w.bias[half] * a.half_sum[half];
        }
      }
    }
    p += info.sub_bytes() * kPanelRows;
  }
}

void FloatProduct(const PackedShape& shape, const uint8_t* panel, const float* const* rows, int m,
                  float* tile) {
  std::fill(tile, tile + kPanelRows * m, 0.0f);
  const int bytes = Info(shape.type).block_bytes;
  for (int64_t k = 0; k < shape.cols; ++k) {
    const uint8_t* line = panel + k * bytes / 4 * 64 + k * bytes % 4;
    for (int lane = 0; lane < kPanelRows; ++lane) {
      float w;
      DequantizeRow(shape.type, line + 4 * lane, &w, 1);
      for (int r = 0; r < m; ++r) tile[kPanelRows * r + lane] += w * rows[r][k];
    }
  }
}

void Quantize(const float* x, int64_t blocks, Q8Block* out) {
  for (int64_t b = 0; b < blocks; ++b, x += 32, ++out) {
    float extreme = 0;
    for (int i = 0; i < 32; ++i) extreme = std::max(extreme, std::fabs(x[i]));
    const bool zero = !(extreme > 1e-30f);
    const float inverse = zero ? 0 : 127 / extreme;
    int32_t sum[2] = {0, 0};
    for (int i = 0; i < 32; ++i) {
      out->q[i] = static_cast<int8_t>(std::nearbyint(x[i] * inverse));
      sum[i / 16] += out->q[i];
    }
    out->scale = zero ? 0 : extreme / 127;
    out->sum = out->scale * static_cast<float>(sum[0] + sum[1]);
    out->neg_sum = -(sum[0] + sum[1]);
    for (int half = 0; half < 2; ++half) {
      out->half_sum[half] = out->scale * static_cast<float>(sum[half]);
      out->neg_half_sum[half] = -sum[half];
    }
    out->unused = 0;
  }
}

void ToBf16(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = FloatToBFloat16(x[i]);
}

float SumSquares(const float* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  return static_cast<float>(sum);
}

void Scale(const float* x, const float* weight, float factor, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

void SwiGlu(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
}

void ClampedSwiGlu(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = std::min(gate[i], kSwiGluLimit);
    const float u = std::clamp(up[i], -kSwiGluLimit, kSwiGluLimit);
    out[i] = g / (1 + std::exp(-kSwiGluAlpha * g)) * (u + 1);
  }
}

void GeGlu(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = gate[i];
    out[i] = g / (1 + std::exp(-g * (kGeluLinear + kGeluCubic * g * g))) * up[i];
  }
}

LinearKernels MakeTable() {
  LinearKernels k = {};
  for (int t = 0; t < kNumDTypes; ++t) {
    if (Info(static_cast<DType>(t)).block_elems > 1) {
      k.int8[t] = Product;
    } else {
      k.f32[t] = FloatProduct;
    }
  }
  k.int8_rows = kFewRows;
  k.quantize = Quantize;
  k.to_bf16 = ToBf16;
  k.sum_squares = SumSquares;
  k.scale = Scale;
  k.gated[static_cast<int>(Activation::kSwiGlu)] = SwiGlu;
  k.gated[static_cast<int>(Activation::kClampedSwiGlu)] = ClampedSwiGlu;
  k.gated[static_cast<int>(Activation::kGeGlu)] = GeGlu;
  return k;
}

}  // namespace

const LinearKernels& ScalarLinearKernels() {
  static const LinearKernels table = MakeTable();
  return table;
}

}  // namespace shoal
