// Any bytes as a GGUF: opened, read as a model, planned, laid out and loaded, as `shoal run` would.
#include <algorithm>
#include <cstdint>
#include <iterator>
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

// One part, or two where a second magic stands in the bytes: then they are the parts of a split
// model.
std::vector<std::unique_ptr<ByteSource>> PartsOf(absl::Span<const uint8_t> bytes) {
  constexpr uint8_t kMagic[] = {'G', 'G', 'U', 'F'};
  std::vector<std::unique_ptr<ByteSource>> parts;
  const auto second = bytes.size() < 4 ? bytes.end()
                                       : std::search(bytes.begin() + 4, bytes.end(),
                                                     std::begin(kMagic), std::end(kMagic));
  const size_t cut = second - bytes.begin();
  parts.push_back(MakeMemorySource("fuzz.gguf", bytes.subspan(0, cut)));
  if (cut < bytes.size()) parts.push_back(MakeMemorySource("second.gguf", bytes.subspan(cut)));
  return parts;
}

}  // namespace
}  // namespace shoal

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto checkpoint = shoal::OpenGguf(shoal::PartsOf(absl::MakeConstSpan(data, size)));
  if (!checkpoint.ok()) return 0;
  SHOAL_CHECK(
      !shoal::InspectText(**checkpoint).empty() && !shoal::InspectJson(**checkpoint).empty(),
      "what was opened can be inspected");
  shoal::TryModel(**checkpoint, shoal::RequestFor(data, size));
  return 0;
}
