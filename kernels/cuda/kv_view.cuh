// Arguments of the attention kernels from those of the Backend.
#pragma once

#include "kernels/cuda/kv_block.cuh"
#include "kernels/kv_layout.h"

namespace shoal::cuda {

inline KvView ViewOf(const KvLayer& kv) {
  return {kv.base, kv.block_stride, KvHeadBytes(kv.shape.type, kv.shape.head_dim),
          kv.shape.kv_heads, kv.shape.head_dim};
}

inline HeadMap MapOf(const AttentionShape& shape) {
  return {shape.q_heads, shape.q_head_begin, shape.kv_head_begin, shape.group,
          shape.window,  shape.sinks,        shape.chunked};
}

// exp(score * scale) = exp2(score * ScaleLog2)
inline float ScaleLog2(const AttentionShape& shape) { return shape.scale * 1.44269504f; }

}  // namespace shoal::cuda
