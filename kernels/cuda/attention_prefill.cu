#include "kernels/cuda/attention_prefill.cuh"

#include "kernels/cuda/attention_ops.h"

namespace shoal::cuda {
namespace {

// Query vectors, K and V of a tile fit in what every chip since sm_75 gives a block, apart from
// heads of more than 128 dims.
struct PrefillChoice {
  void (*kernel)(PrefillParams) = nullptr;
  int vectors = 0;
  int threads = 0;
  int64_t shared_bytes = 0;
};

template <typename T>
PrefillChoice Choice() {
  return {AttendTile<T>, T::kVectors, T::kThreads, T::kSharedBytes};
}

template <bool kQ8>
PrefillChoice Choose(int head_dim) {
  if (head_dim <= 64) return Choice<PrefillTraits<kQ8, 64, 4, 64>>();
  // The sums of 32 dims of q8_0 are registers too: fewer scores at a time leave room for them.
  constexpr int kTokens = kQ8 ? 48 : 64;
  if (head_dim <= 96) return Choice<PrefillTraits<kQ8, 96, 4, kTokens>>();
  if (head_dim <= 128) return Choice<PrefillTraits<kQ8, 128, 4, kTokens>>();
  if (head_dim <= 256) return Choice<PrefillTraits<kQ8, 256, 2, 32>>();
  return {};
}

PrefillChoice Choose(KvType type, int head_dim) {
  switch (type) {
    case KvType::kF32:
      break;
    case KvType::kF16:
      return Choose<false>(head_dim);
    case KvType::kQ8_0:
      return Choose<true>(head_dim);
  }
  return {};
}

}  // namespace

int PrefillTile(const KvShape& kv, int64_t max_shared_bytes) {
  const PrefillChoice choice = Choose(kv.type, kv.head_dim);
  return choice.shared_bytes <= max_shared_bytes ? choice.vectors : 0;
}

void AttendPrompt(const PrefillParams& params, KvType type, int items, Stream stream) {
  const PrefillChoice choice = Choose(type, params.kv.head_dim);
  Launch(choice.kernel, dim3(items, params.kv.kv_heads), dim3(choice.threads),
         static_cast<size_t>(choice.shared_bytes), stream, params);
}

}  // namespace shoal::cuda
