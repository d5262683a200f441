// What joins gate and up of an FFN.
#pragma once

#include <cstdint>

namespace shoal {

enum class Activation : uint8_t {
  kSwiGlu,  // silu(gate) * up
  // With g = min(gate, 7) and u = clamp(up, -7, 7): g * sigmoid(1.702 g) * (u + 1), as gpt-oss has
  // it.
  kClampedSwiGlu,
  kGeGlu,  // gelu(gate) * up with gelu(x) = x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2
};
inline constexpr int kNumActivations = 3;
inline constexpr float kSwiGluLimit = 7, kSwiGluAlpha = 1.702f;  // of kClampedSwiGlu
// As (1 + tanh(y)) / 2 = sigmoid(2 y): gelu(x) = x * sigmoid(kGeluLinear * x + kGeluCubic * x^3)
inline constexpr float kGeluLinear = 1.5957691216f, kGeluCubic = 0.0713548163f;

}  // namespace shoal
