#include "kernels/cpu/segments.h"

#include "kernels/check.h"

namespace shoal {

void CheckSegments(const Backend::Limits& limits, const AttentionShape& shape, const KvLayer& kv,
                   absl::Span<const Segment> segments) {
  SHOAL_CHECK(limits.rows > 0, "call Reserve before the ops");
  SHOAL_CHECK(shape.head_dim == kv.shape.head_dim, "queries and KV cache differ in head_dim");
  SHOAL_CHECK(shape.head_dim >= 2 && shape.head_dim % 2 == 0 && shape.head_dim <= limits.head_dim,
              "head_dim is odd or beyond Limits");
  SHOAL_CHECK(shape.q_heads >= 1 && shape.q_heads <= limits.heads, "q_heads are beyond Limits");
  SHOAL_CHECK(shape.scale > 0, "scale is not positive");
  SHOAL_CHECK(shape.group >= 1 && shape.group <= kMaxGroup, "group is out of range");
  const int first = shape.q_head_begin / shape.group - shape.kv_head_begin;
  const int last = (shape.q_head_begin + shape.q_heads - 1) / shape.group - shape.kv_head_begin;
  SHOAL_CHECK(first >= 0 && last < kv.shape.kv_heads, "a query head's KV head is not held here");
  SHOAL_CHECK(static_cast<int>(segments.size()) <= limits.rows, "more segments than rows");
  for (const Segment& s : segments) {
    SHOAL_CHECK(s.row >= 0 && s.rows >= 0 && s.row <= limits.rows - s.rows,
                "a segment's rows are beyond Limits");
    SHOAL_CHECK(s.pos >= 0 && s.pos <= limits.context - s.rows,
                "a segment's positions are beyond Limits");
    SHOAL_CHECK(s.rows == 0 || s.blocks != nullptr, "a segment has no block table");
  }
}

}  // namespace shoal
