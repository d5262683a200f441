#include "kernels/kv_layout.h"

namespace shoal {

int64_t KvShape::k_bytes() const { return kv_heads * KvHeadBytes(type, head_dim); }
int64_t KvShape::v_bytes() const { return k_bytes(); }

}  // namespace shoal
