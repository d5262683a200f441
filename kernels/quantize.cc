// Round-to-nearest quantizers with a small search for the scale of each block.
//
// A block's scale is not the one that makes its largest value fit exactly but, of a few candidates
// near it, the one with the least squared error after a least-squares refit of the scale to the
// chosen codes (the idea of ggml's reference quantizers). Sub-blocks of K-quants weigh each element
// by its square, as large weights matter more.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/dtype.h"
#include "kernels/row_planes.h"

namespace shoal {
namespace {

// Half away from zero, in a form that compilers turn into vector instructions.
int RoundClamp(float x, int lo, int hi) {
  const float c = std::min(std::max(x, static_cast<float>(lo)), static_cast<float>(hi));
  return static_cast<int>(c + (c < 0 ? -0.5f : 0.5f));
}

float AbsMax(const float* x, int n) {
  float m = 0;
  for (int i = 0; i < n; ++i) m = std::max(m, std::fabs(x[i]));
  return m;
}

// The value of largest magnitude, with its sign.
float SignedMax(const float* x, int n) {
  float m = 0;
  for (int i = 0; i < n; ++i) {
    if (std::fabs(x[i]) > std::fabs(m)) m = x[i];
  }
  return m;
}

void StoreHalf(uint8_t* dst, float f) {
  const uint16_t h = FloatToHalf(f);
  std::memcpy(dst, &h, 2);
}

float Rounded(float f) { return HalfToFloat(FloatToHalf(f)); }

// Sums are kept in lanes, so that the compiler may take several elements at once without changing
// the order of any sum; unrolling a loop over lanes would keep GCC from it. Everything fitted has a
// multiple of 16 elements.
constexpr int kLanes = 8;

float Total(const float lanes[kLanes]) {
  float sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

// The scale of values level(x * inverse) that leaves the least sum of w (x - scale * level)^2, w =
// x^2, over the candidate inverses start + step * i, i in 0..count.
template <typename Level>
float FitScaleTo(const float* x, int n, float start, float step, int count, Level level_of) {
  float best_scale = 0, best_gain = -1;
  for (int candidate = 0; candidate < count; ++candidate) {
    const float inverse = start + step * static_cast<float>(candidate);
    float xl[kLanes] = {}, ll[kLanes] = {};
    for (int i = 0; i < n; i += kLanes) {
#pragma GCC unroll 1
      for (int l = 0; l < kLanes; ++l) {
        const float v = x[i + l], level = level_of(v * inverse);
        xl[l] += v * v * v * level;
        ll[l] += v * v * level * level;
      }
    }
    const float sum_xl = Total(xl), sum_ll = Total(ll);
    // The error left is sum w x^2 - xl^2 / ll.
    if (sum_ll > 0 && sum_xl * sum_xl > best_gain * sum_ll) {
      best_gain = sum_xl * sum_xl / sum_ll;
      best_scale = sum_xl / sum_ll;
    }
  }
  return best_scale;
}

// Levels are the integers [-levels, levels - 1]; the extreme value meets -levels, give or take.
float FitScale(const float* x, int n, int levels) {
  const float extreme = SignedMax(x, n);
  if (extreme == 0) return 0;
  const float reach = static_cast<float>(levels);
  return FitScaleTo(x, n, -(reach - 0.9f) / extreme, -0.1f / extreme, 19, [levels](float v) {
    return static_cast<float>(RoundClamp(v, -levels, levels - 1));
  });
}

// x ~ scale * q - min with q in [0, levels], min >= 0.
struct ScaleMin {
  float scale = 0, min = 0;
};

// The least-squares line through (q, x), where q are x's codes for one inverse scale. Elements
// weigh `base` + |x|.
ScaleMin FitLine(const float* x, int n, float lo, float inverse, int levels, float base) {
  float w_[kLanes] = {}, wq[kLanes] = {}, wqq[kLanes] = {}, wx[kLanes] = {}, wxq[kLanes] = {};
  for (int i = 0; i < n; i += kLanes) {
#pragma GCC unroll 1
    for (int l = 0; l < kLanes; ++l) {
      const float v = x[i + l], w = base + std::fabs(v);
      const float q = static_cast<float>(RoundClamp((v - lo) * inverse, 0, levels));
      w_[l] += w;
      wq[l] += w * q;
      wqq[l] += w * q * q;
      wx[l] += w * v;
      wxq[l] += w * v * q;
    }
  }
  const float sw = Total(w_), sq = Total(wq), sqq = Total(wqq), sx = Total(wx), sxq = Total(wxq);
  const float det = sw * sqq - sq * sq;
  if (det <= 0) return {};
  const ScaleMin fit{(sw * sxq - sx * sq) / det, -(sqq * sx - sq * sxq) / det};
  return fit.min < 0 ? ScaleMin{sxq / sqq, 0} : fit;
}

float LineError(const float* x, int n, const ScaleMin& fit, int levels, float base) {
  const float inverse = 1 / fit.scale;
  float error[kLanes] = {};
  for (int i = 0; i < n; i += kLanes) {
#pragma GCC unroll 1
    for (int l = 0; l < kLanes; ++l) {
      const float v = x[i + l];
      const float q = static_cast<float>(RoundClamp((v + fit.min) * inverse, 0, levels));
      const float d = fit.scale * q - fit.min - v;
      error[l] += (base + std::fabs(v)) * d * d;
    }
  }
  return Total(error);
}

ScaleMin FitScaleMin(const float* x, int n, int levels) {
  const float lo = std::min(*std::min_element(x, x + n), 0.0f);
  const float hi = *std::max_element(x, x + n);
  if (hi <= lo) return {0, -lo};
  float squares = 0;
  for (int i = 0; i < n; ++i) squares += x[i] * x[i];
  const float base = std::sqrt(squares / static_cast<float>(n));
  ScaleMin best;
  float best_error = INFINITY;
  for (int step = -10; step <= 10; ++step) {
    const float inverse =
        (static_cast<float>(levels) + 0.1f * static_cast<float>(step)) / (hi - lo);
    const ScaleMin fit = FitLine(x, n, lo, inverse, levels, base);
    if (!(fit.scale > 0)) continue;
    const float error = LineError(x, n, fit, levels, base);
    if (error < best_error) {
      best_error = error;
      best = fit;
    }
  }
  return best_error < INFINITY ? best : ScaleMin{(hi - lo) / static_cast<float>(levels), -lo};
}

// Index of the level nearest to x.
int NearestMxfp4(float x) {
  int best = 0;
  for (int i = 1; i < 16; ++i) {
    if (std::fabs(x - kLevelsMxfp4[i]) < std::fabs(x - kLevelsMxfp4[best])) best = i;
  }
  return best;
}

// IQ4's levels ascend: the code is the number of midpoints below x, and the level the sum of the
// steps so far.
int NearestIq4(float x) {
  int index = 0;
  for (int i = 0; i < 15; ++i) {
    index += x > 0.5f * static_cast<float>(kLevelsIq4[i] + kLevelsIq4[i + 1]);
  }
  return index;
}

// Scale for IQ4's uneven levels.
float FitIq4(const float* x, int n) {
  const float extreme = SignedMax(x, n);
  if (extreme == 0) return 0;
  const float lowest = kLevelsIq4[0];
  return FitScaleTo(x, n, (lowest - 7) / extreme, 1 / extreme, 15, [](float v) {
    float level = kLevelsIq4[0];
    for (int i = 0; i < 15; ++i) {
      const float below = kLevelsIq4[i], above = kLevelsIq4[i + 1];
      level += v > 0.5f * (below + above) ? above - below : 0.0f;
    }
    return level;
  });
}

// Codes of 32 elements as halves: byte j = code j | code 16 + j << 4; the fifth bits go to *hi.
void StoreNibbles(const int codes[32], uint8_t* qs, uint8_t* hi) {
  uint32_t bits = 0;
  for (int j = 0; j < 16; ++j) {
    qs[j] = static_cast<uint8_t>((codes[j] & 15) | ((codes[16 + j] & 15) << 4));
  }
  for (int j = 0; j < 32; ++j) bits |= static_cast<uint32_t>((codes[j] >> 4) & 1) << j;
  if (hi != nullptr) std::memcpy(hi, &bits, 4);
}

void QuantizeSigned(const float* x, int levels, uint8_t* block, uint8_t* hi, uint8_t* qs) {
  const float d = SignedMax(x, 32) / static_cast<float>(-levels);
  const float inverse = d != 0 ? 1 / d : 0;
  int codes[32];
  for (int i = 0; i < 32; ++i) {
    codes[i] = std::min(2 * levels - 1,
                        static_cast<int>(x[i] * inverse + static_cast<float>(levels) + 0.5f));
  }
  StoreHalf(block, d);
  StoreNibbles(codes, qs, hi);
}

void QuantizeMin(const float* x, int levels, uint8_t* block, uint8_t* hi, uint8_t* qs) {
  const float lo = *std::min_element(x, x + 32);
  const float d = (*std::max_element(x, x + 32) - lo) / static_cast<float>(levels);
  const float inverse = d != 0 ? 1 / d : 0;
  int codes[32];
  for (int i = 0; i < 32; ++i)
    codes[i] = std::min(levels, static_cast<int>((x[i] - lo) * inverse + 0.5f));
  StoreHalf(block, d);
  StoreHalf(block + 2, lo);
  StoreNibbles(codes, qs, hi);
}

void QuantizeQ8(const float* x, uint8_t* block) {
  const float d = AbsMax(x, 32) / 127;
  const float inverse = d != 0 ? 1 / d : 0;
  StoreHalf(block, d);
  for (int i = 0; i < 32; ++i) {
    block[2 + i] = static_cast<uint8_t>(static_cast<int8_t>(std::round(x[i] * inverse)));
  }
}

void QuantizeIq4Nl(const float* x, uint8_t* block) {
  const float d = Rounded(FitIq4(x, 32));
  const float inverse = d != 0 ? 1 / d : 0;
  int codes[32];
  for (int i = 0; i < 32; ++i) codes[i] = NearestIq4(x[i] * inverse);
  StoreHalf(block, d);
  StoreNibbles(codes, block + 2, nullptr);
}

void QuantizeMxfp4(const float* x, uint8_t* block) {
  const float extreme = AbsMax(x, 32);
  // The largest level is 6 = 1.5 * 2^2: the exponent of the largest value, less 2 (OCP MX
  // specification, 6.3).
  const int e = extreme > 0 ? std::clamp(std::ilogb(extreme) - 2 + 127, 0, 254) : 0;
  const float inverse = 1 / HalfE8M0(static_cast<uint8_t>(e));
  int codes[32];
  for (int i = 0; i < 32; ++i) codes[i] = NearestMxfp4(x[i] * inverse);
  block[0] = static_cast<uint8_t>(e);
  StoreNibbles(codes, block + 1, nullptr);
}

// Fits 16 or 8 sub-scales to integers [0, levels] times one f16 scale.
float FitSuperScale(const float* scales, int n, int levels) {
  return Rounded(*std::max_element(scales, scales + n) / static_cast<float>(levels));
}

int Code(float x, float scale, float min, int levels) {
  return scale != 0 ? RoundClamp((x + min) / scale, 0, levels) : 0;
}

// Two bits of code i of sub-block s, in Q2_K's and Q3_K's order (and Q6_K's high bits).
void StoreTwo(uint8_t* qs, int s, int i, int bits) {
  qs[32 * (s / 4) + i] |= static_cast<uint8_t>(bits << (2 * (s % 4)));
}

void QuantizeQ2K(const float* x, uint8_t* block) {
  ScaleMin fit[16];
  float scales[16], mins[16];
  for (int i = 0; i < 16; ++i) {
    fit[i] = FitScaleMin(x + 16 * i, 16, 3);
    scales[i] = fit[i].scale;
    mins[i] = fit[i].min;
  }
  const float d = FitSuperScale(scales, 16, 15), dmin = FitSuperScale(mins, 16, 15);
  std::memset(block, 0, 84);
  StoreHalf(block + 80, d);
  StoreHalf(block + 82, dmin);
  for (int i = 0; i < 16; ++i) {
    const int sc = Code(scales[i], d, 0, 15), mn = Code(mins[i], dmin, 0, 15);
    block[i] = static_cast<uint8_t>(sc | (mn << 4));
    const float scale = d * static_cast<float>(sc), min = dmin * static_cast<float>(mn);
    for (int j = 0; j < 16; ++j) {
      StoreTwo(block + 16, i / 2, 16 * (i % 2) + j, Code(x[16 * i + j], scale, min, 3));
    }
  }
}

// Signed sub-scales as integers [-levels, levels - 1] times one f16 scale.
float FitSignedSuperScale(const float* scales, int n, int levels) {
  return Rounded(SignedMax(scales, n) / static_cast<float>(-levels));
}

void QuantizeQ3K(const float* x, uint8_t* block) {
  float scales[16];
  for (int i = 0; i < 16; ++i) scales[i] = FitScale(x + 16 * i, 16, 4);
  const float d = FitSignedSuperScale(scales, 16, 32);
  std::memset(block, 0, 110);
  StoreHalf(block + 108, d);
  for (int i = 0; i < 16; ++i) {
    const int sc = d != 0 ? RoundClamp(scales[i] / d, -32, 31) : 0;
    const int stored = sc + 32;
    block[96 + i % 8] |= static_cast<uint8_t>((stored & 15) << (i < 8 ? 0 : 4));
    block[104 + i % 4] |= static_cast<uint8_t>((stored >> 4) << (2 * (i / 4)));
    const float scale = d * static_cast<float>(sc);
    for (int j = 0; j < 16; ++j) {
      const int code = scale != 0 ? RoundClamp(x[16 * i + j] / scale, -4, 3) + 4 : 4;
      const int s = i / 2, at = 16 * (i % 2) + j;
      StoreTwo(block + 32, s, at, code & 3);
      block[at] |= static_cast<uint8_t>((code >> 2) << s);
    }
  }
}

// Q4_K (levels 15) and Q5_K (levels 31).
void QuantizeQ45K(const float* x, int levels, uint8_t* block) {
  float scales[8], mins[8];
  for (int s = 0; s < 8; ++s) {
    const ScaleMin fit = FitScaleMin(x + 32 * s, 32, levels);
    scales[s] = fit.scale;
    mins[s] = fit.min;
  }
  const float d = FitSuperScale(scales, 8, 63), dmin = FitSuperScale(mins, 8, 63);
  const bool five = levels == 31;
  std::memset(block, 0, five ? 176 : 144);
  StoreHalf(block, d);
  StoreHalf(block + 2, dmin);
  uint8_t* b = block + 4;
  uint8_t* qh = block + 16;
  uint8_t* qs = block + (five ? 48 : 16);
  for (int s = 0; s < 8; ++s) {
    const int sc = Code(scales[s], d, 0, 63), mn = Code(mins[s], dmin, 0, 63);
    if (s < 4) {
      b[s] |= static_cast<uint8_t>(sc);
      b[s + 4] |= static_cast<uint8_t>(mn);
    } else {
      b[s + 4] |= static_cast<uint8_t>((sc & 15) | ((mn & 15) << 4));
      b[s - 4] |= static_cast<uint8_t>((sc >> 4) << 6);
      b[s] |= static_cast<uint8_t>((mn >> 4) << 6);
    }
    const float scale = d * static_cast<float>(sc), min = dmin * static_cast<float>(mn);
    for (int i = 0; i < 32; ++i) {
      const int code = Code(x[32 * s + i], scale, min, levels);
      qs[32 * (s / 2) + i] |= static_cast<uint8_t>((code & 15) << (4 * (s % 2)));
      if (five) qh[i] |= static_cast<uint8_t>((code >> 4) << s);
    }
  }
}

void QuantizeQ6K(const float* x, uint8_t* block) {
  float scales[16];
  for (int i = 0; i < 16; ++i) scales[i] = FitScale(x + 16 * i, 16, 32);
  const float d = FitSignedSuperScale(scales, 16, 128);
  std::memset(block, 0, 210);
  StoreHalf(block + 208, d);
  for (int i = 0; i < 16; ++i) {
    const int sc = d != 0 ? RoundClamp(scales[i] / d, -128, 127) : 0;
    block[192 + i] = static_cast<uint8_t>(sc);
    const float scale = d * static_cast<float>(sc);
    const int s = i / 2;
    for (int j = 0; j < 16; ++j) {
      const int code = scale != 0 ? RoundClamp(x[16 * i + j] / scale, -32, 31) + 32 : 32;
      const int at = 16 * (i % 2) + j;
      block[64 * (s / 4) + 32 * (s % 2) + at] |=
          static_cast<uint8_t>((code & 15) << (s % 4 < 2 ? 0 : 4));
      StoreTwo(block + 128, s, at, code >> 4);
    }
  }
}

void QuantizeIq4Xs(const float* x, uint8_t* block) {
  float scales[8];
  for (int s = 0; s < 8; ++s) scales[s] = FitIq4(x + 32 * s, 32);
  const float d = FitSignedSuperScale(scales, 8, 32);
  std::memset(block, 0, 136);
  StoreHalf(block, d);
  uint16_t scales_h = 0;
  for (int s = 0; s < 8; ++s) {
    const int sc = d != 0 ? RoundClamp(scales[s] / d, -32, 31) : 0;
    scales_h = static_cast<uint16_t>(scales_h | ((sc + 32) >> 4) << (2 * s));
    block[4 + s / 2] |= static_cast<uint8_t>(((sc + 32) & 15) << (4 * (s % 2)));
    const float scale = d * static_cast<float>(sc);
    const float inverse = scale != 0 ? 1 / scale : 0;
    int codes[32];
    for (int i = 0; i < 32; ++i) codes[i] = NearestIq4(x[32 * s + i] * inverse);
    StoreNibbles(codes, block + 8 + 16 * s, nullptr);
  }
  std::memcpy(block + 2, &scales_h, 2);
}

void QuantizeBlock(DType type, const float* x, uint8_t* block) {
  switch (type) {
    case DType::kQ4_0:
      return QuantizeSigned(x, 8, block, nullptr, block + 2);
    case DType::kQ4_1:
      return QuantizeMin(x, 15, block, nullptr, block + 4);
    case DType::kQ5_0:
      return QuantizeSigned(x, 16, block, block + 2, block + 6);
    case DType::kQ5_1:
      return QuantizeMin(x, 31, block, block + 4, block + 8);
    case DType::kQ8_0:
      return QuantizeQ8(x, block);
    case DType::kQ2_K:
      return QuantizeQ2K(x, block);
    case DType::kQ3_K:
      return QuantizeQ3K(x, block);
    case DType::kQ4_K:
      return QuantizeQ45K(x, 15, block);
    case DType::kQ5_K:
      return QuantizeQ45K(x, 31, block);
    case DType::kQ6_K:
      return QuantizeQ6K(x, block);
    case DType::kIQ4_NL:
      return QuantizeIq4Nl(x, block);
    case DType::kIQ4_XS:
      return QuantizeIq4Xs(x, block);
    case DType::kMXFP4:
      return QuantizeMxfp4(x, block);
    case DType::kF32:
      std::memcpy(block, x, 4);
      return;
    case DType::kF16:
      StoreHalf(block, *x);
      return;
    case DType::kBF16: {
      const uint16_t h = FloatToBFloat16(*x);
      std::memcpy(block, &h, 2);
      return;
    }
  }
}

}  // namespace

void QuantizeRow(DType type, const float* src, void* dst, int64_t elems) {
  const DTypeInfo& info = Info(type);
  uint8_t* block = static_cast<uint8_t*>(dst);
  for (int64_t i = 0; i < elems; i += info.block_elems, block += info.block_bytes) {
    QuantizeBlock(type, src + i, block);
  }
}

}  // namespace shoal
