// Writes the keys and values of a batch into the KV cache: per-head norm, rotation, conversion.
#pragma once

#include <cstdint>

#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/cpu/thread_pool.h"

namespace shoal {

// Not thread-safe: one call at a time, like the Backend that owns it.
class KvStore {
 public:
  // `to_half` is the conversion of the chosen instruction set (attention_kernels.h). The pool
  // outlives the store.
  KvStore(void (*to_half)(const float* x, uint16_t* out, int n), ThreadPool* pool)
      : to_half_(to_half), pool_(pool) {}

  // As Backend::QkvToCache, with arguments that CheckSegments accepted.
  void Write(const QkvArgs& args, const AttentionShape& shape, const KvLayer& kv,
             absl::Span<const Segment> segments);

 private:
  struct Token;
  void WriteHead(const Token& token, const float* x, int head, bool is_k, const KvLayer& kv) const;
  void WriteToken(const QkvArgs& args, const AttentionShape& shape, const KvLayer& kv,
                  const Token& token) const;

  void (*to_half_)(const float* x, uint16_t* out, int n);
  ThreadPool* const pool_;
};

}  // namespace shoal
