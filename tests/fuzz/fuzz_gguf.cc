// Any bytes as a GGUF: opened, read as a model, planned, laid out and loaded, as `shoal run` would.
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/check.h"
#include "shard/checkpoint.h"
#include "shard/gguf.h"
#include "shard/inspect.h"
#include "shard/model_config.h"
#include "shard/shard_plan.h"
#include "shard/weight_layout.h"

namespace shoal {
namespace {

constexpr int64_t kMaxLoadBytes = 8 << 20;  // more would only make each run slower

// Small counts that vary with the input, so that plans vary too.
ShardRequest RequestFor(const uint8_t* data, size_t size) {
  ShardRequest request;
  request.tp = 1 + (size > 0 ? data[size - 1] % 5 : 0);
  request.pp = 1 + (size > 1 ? data[size - 2] % 3 : 0);
  if (size > 2 && data[size - 3] % 2 == 1) {
    for (int i = 0; i < request.tp; ++i) request.split.push_back(1 + i * 0.7);
  }
  return request;
}

void TryModel(const Checkpoint& checkpoint, const ShardRequest& request) {
  const auto config = ReadModelConfig(checkpoint);
  if (!config.ok()) return;
  const auto plan = MakeShardPlan(*config, checkpoint, request);
  if (!plan.ok()) return;
  for (const RankPlan& rank : plan->ranks) {
    const auto layout = MakeWeightLayout(checkpoint, *config, rank);
    SHOAL_CHECK(layout.ok(), "a planned model must have a layout");
    if (layout->bytes > kMaxLoadBytes) continue;
    std::vector<uint8_t> out(layout->bytes);
    SHOAL_CHECK(LoadAll(checkpoint, *layout, 1, out.data(), nullptr).ok(),
                "what was opened must load");
  }
}

}  // namespace
}  // namespace shoal

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::vector<std::unique_ptr<shoal::ByteSource>> parts;
  parts.push_back(shoal::MakeMemorySource("fuzz.gguf", absl::MakeConstSpan(data, size)));
  const auto checkpoint = shoal::OpenGguf(std::move(parts));
  if (!checkpoint.ok()) return 0;
  SHOAL_CHECK(
      !shoal::InspectText(**checkpoint).empty() && !shoal::InspectJson(**checkpoint).empty(),
      "what was opened can be inspected");
  shoal::TryModel(**checkpoint, shoal::RequestFor(data, size));
  return 0;
}
