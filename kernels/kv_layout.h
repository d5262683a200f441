// Where a value of the KV cache lies. The one place that knows the bytes of a KV block; README.md
// restates it.
//
// A block holds kKvBlockTokens = 16 tokens of one layer: K of all heads, then V of all heads. For
// each head
//
//            f32, f16                     q8_0
//   K        x[head_dim][16 tokens]       d f16[parts][16 tokens], then i8[head_dim][16 tokens]
//   V        x[16 tokens][head_dim]       d f16[parts][16 tokens], then i8[16 tokens][head_dim]
//
// where part p of a q8_0 token is its dims [32p, 32p + 32), the last one shorter when head_dim is
// no multiple of 32, and a value is d * i8. Sixteen tokens side by side make one vector of scores
// in K; dims side by side make one vector of outputs in V. head_dim is even, so K and V of each
// head start at multiples of 32 bytes.
#pragma once

#include <cstdint>

#include "kernels/backend.h"

namespace shoal {

inline constexpr int kKvPartDims = 32;  // dims that share a q8_0 scale

inline int KvParts(int head_dim) { return (head_dim + kKvPartDims - 1) / kKvPartDims; }

// Bytes of K of one head in a block; V takes the same.
inline int64_t KvHeadBytes(KvType type, int head_dim) {
  const int64_t values = static_cast<int64_t>(head_dim) * kKvBlockTokens;
  switch (type) {
    case KvType::kF32:
      return values * 4;
    case KvType::kF16:
      return values * 2;
    case KvType::kQ8_0:
      return values + int64_t{2} * kKvBlockTokens * KvParts(head_dim);
  }
  return 0;
}

inline uint8_t* KvBlockK(const KvLayer& kv, int block, int kv_head) {
  return kv.base + block * kv.block_stride +
         kv_head * KvHeadBytes(kv.shape.type, kv.shape.head_dim);
}

inline uint8_t* KvBlockV(const KvLayer& kv, int block, int kv_head) {
  return KvBlockK(kv, block, kv.shape.kv_heads + kv_head);
}

}  // namespace shoal
