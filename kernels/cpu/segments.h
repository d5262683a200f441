// What the ops over segments of a batch expect of their arguments.
#pragma once

#include "absl/types/span.h"
#include "kernels/backend.h"

namespace shoal {

inline constexpr int kMaxHeadDim = 512;
inline constexpr int kMaxGroup = 256;  // query heads of one KV head

// Checks that q heads, KV heads and the segments fit each other and the limits. Every op over
// segments calls it.
void CheckSegments(const Backend::Limits& limits, const AttentionShape& shape, const KvLayer& kv,
                   absl::Span<const Segment> segments);

}  // namespace shoal
