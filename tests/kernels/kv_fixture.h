// A paged KV cache with garbage in every byte that no token owns, and its values read back by the
// layout's rules.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/backend.h"
#include "kernels/dtype.h"

namespace shoal {

inline const char* KvTypeName(KvType type) {
  return type == KvType::kF32 ? "f32" : type == KvType::kF16 ? "f16" : "q8_0";
}

class TestKv {
 public:
  // `blocks` blocks in a pool of twice as many, spread over it in random order.
  TestKv(KvShape shape, int blocks, std::mt19937& rng) {
    layer_.shape = shape;
    layer_.block_stride = shape.block_bytes() + 64;
    // 0xff is NaN as f32, as f16 and as a scale: whoever reads a token that was never written shows
    // it.
    pool_.assign(layer_.block_stride * blocks * 2 + 64, 0xff);
    const auto address = reinterpret_cast<uintptr_t>(pool_.data());
    layer_.base = pool_.data() + (64 - address % 64) % 64;
    for (int i = 0; i < blocks * 2; ++i) table_.push_back(i);
    std::shuffle(table_.begin(), table_.end(), rng);
  }

  const KvLayer& layer() const { return layer_; }
  const int32_t* table(int first_block = 0) const { return table_.data() + first_block; }

  // The value that the layout in kernels/README.md puts at this place. Written out here once more
  // on purpose.
  float Get(bool is_k, const int32_t* table, int pos, int head, int dim) const {
    const KvShape& s = layer_.shape;
    const int lane = pos % 16;
    const int64_t value = is_k ? dim * 16 + lane : lane * s.head_dim + dim;
    const int parts = (s.head_dim + 31) / 32;
    const int64_t head_bytes = s.type == KvType::kF32   ? 64 * s.head_dim
                               : s.type == KvType::kF16 ? 32 * s.head_dim
                                                        : 16 * s.head_dim + 32 * parts;
    const uint8_t* base = layer_.base + table[pos / 16] * layer_.block_stride +
                          (is_k ? head : s.kv_heads + head) * head_bytes;
    if (s.type == KvType::kF32) {
      float f;
      std::memcpy(&f, base + 4 * value, 4);
      return f;
    }
    uint16_t half;
    if (s.type == KvType::kF16) {
      std::memcpy(&half, base + 2 * value, 2);
      return HalfToFloat(half);
    }
    std::memcpy(&half, base + 2 * (dim / 32 * 16 + lane), 2);
    return HalfToFloat(half) * static_cast<int8_t>(base[32 * parts + value]);
  }

 private:
  std::vector<uint8_t> pool_;
  std::vector<int32_t> table_;
  KvLayer layer_;
};

inline std::vector<float> RandomFloats(int64_t n, std::mt19937& rng, float spread = 1) {
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> v(n);
  for (float& f : v) f = normal(rng);
  return v;
}

}  // namespace shoal
