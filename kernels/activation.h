// What joins gate and up of an FFN.
#pragma once

#include <cstdint>

namespace shoal {

enum class Activation : uint8_t {
  kSwiGlu,  // silu(gate) * up
  // With g = min(gate, 7) and u = clamp(up, -7, 7): g * sigmoid(1.702 g) * (u + 1), as gpt-oss has
  // it.
  kClampedSwiGlu,
};
inline constexpr float kSwiGluLimit = 7, kSwiGluAlpha = 1.702f;  // of kClampedSwiGlu

}  // namespace shoal
