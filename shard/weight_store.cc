#include "shard/weight_store.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/buffer.h"
#include "kernels/status_macros.h"
#include "shard/shard_file.h"

namespace shoal {
namespace {

class LoadedWeights final : public WeightSource {
 public:
  LoadedWeights(Buffer memory, std::vector<int64_t> offsets)
      : memory_(std::move(memory)), units_(memory_.data(), std::move(offsets)) {}
  absl::StatusOr<const uint8_t*> Acquire(int unit) override { return units_.Acquire(unit); }
  void Release(int unit) override { units_.Release(unit); }
  bool fixed(int unit) const override { return units_.fixed(unit); }

 private:
  Buffer memory_;
  ResidentWeights units_;
};

absl::StatusOr<WeightStore> LoadEverything(const Checkpoint& checkpoint, const WeightLayout& layout,
                                           const WeightStoreOptions& options) {
  SHOAL_ASSIGN_OR_RETURN(Buffer memory, Buffer::Allocate(layout.bytes));
  SHOAL_RETURN_IF_ERROR(
      LoadAll(checkpoint, layout, options.threads, memory.data(), options.progress));
  std::vector<int64_t> offsets;
  for (const WeightUnit& u : layout.units) offsets.push_back(u.offset);
  WeightStore store;
  store.source = std::make_unique<LoadedWeights>(std::move(memory), std::move(offsets));
  store.origin = checkpoint.Files()[0];
  return store;
}

std::vector<StreamUnit> StreamUnits(const WeightLayout& layout, const Placement& placement,
                                    const std::vector<bool>& skip) {
  std::vector<StreamUnit> units(layout.units.size());
  for (size_t i = 0; i < layout.units.size(); ++i) {
    if (!skip.empty() && skip[i]) continue;  // resident, without a byte
    const WeightUnit& u = layout.units[i];
    StreamUnit& s = units[i];
    s.tier = placement.tiers[i];
    s.bytes = u.bytes;
    s.file_offset = kShardDataOffset + u.offset;
    if (u.kind == WeightUnit::Kind::kEmbedding) s.panel_bytes = u.extents[0].shape.panel_bytes();
  }
  return units;
}

// One panel of the embedding, made from its 16 rows.
absl::Status LoadPanel(const Checkpoint& checkpoint, const WeightUnit& unit, int64_t panel,
                       uint8_t* out) {
  WeightUnit one = unit;
  one.extents.resize(1);
  WeightExtent& e = one.extents[0];
  e.row_begin += panel * kPanelRows;
  e.shape.rows = std::min<int64_t>(kPanelRows, e.shape.rows - panel * kPanelRows);
  e.bytes = one.bytes = e.shape.bytes();
  return LoadUnit(checkpoint, one, out);
}

}  // namespace

absl::StatusOr<WeightStore> OpenWeights(const Checkpoint& checkpoint, const WeightLayout& layout,
                                        const Placement& placement,
                                        const WeightStoreOptions& options) {
  const auto* directory = dynamic_cast<const ShardDirectory*>(&checkpoint);
  const bool all_resident = std::all_of(placement.tiers.begin(), placement.tiers.end(),
                                        [](Tier t) { return t == Tier::kResident; });
  if (directory == nullptr && all_resident && options.skip.empty())
    return LoadEverything(checkpoint, layout, options);

  StreamerOptions s;
  s.units = StreamUnits(layout, placement, options.skip);
  s.cycle = placement.cycle;
  s.ring_bytes = placement.ring_bytes;
  s.expert_slots = placement.expert_slots;
  s.file = options.file;
  s.progress = options.progress;
  WeightStore store;
  if (directory != nullptr) {
    SHOAL_ASSIGN_OR_RETURN(const int rank, directory->FindRank(layout));
    s.path = directory->RankPath(rank);
    for (size_t i = 0; i < layout.units.size(); ++i) {
      // Of an embedding that does not stay only rows are read, and a row has no checksum.
      if (layout.units[i].kind != WeightUnit::Kind::kEmbedding) continue;
      if (placement.tiers[i] == Tier::kResident) continue;
      SHOAL_RETURN_IF_ERROR(directory->CheckUnitOnDisk(rank, static_cast<int>(i), options.file));
    }
    s.check = [directory, rank, source = options.source, warn = options.warn](int unit,
                                                                              uint8_t* data) {
      const absl::Status status = directory->CheckUnit(rank, unit, data);
      if (status.ok() || source == nullptr) return status;
      if (warn) warn(absl::StrCat(status.message(), " (this is done now)"));
      return directory->Repair(rank, unit, *source, data);
    };
    store.origin = s.path;
  } else {
    s.loader_threads = std::max(1, options.threads);
    s.load = [&checkpoint, &layout](int unit, uint8_t* out) {
      return LoadUnit(checkpoint, layout.units[unit], out);
    };
    s.load_panel = [&checkpoint, &layout](int unit, int64_t panel, uint8_t* out) {
      return LoadPanel(checkpoint, layout.units[unit], panel, out);
    };
    store.origin = checkpoint.Files()[0] + ", repacked on the fly";
  }
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<WeightStreamer> streamer,
                         WeightStreamer::Create(std::move(s)));
  store.streamer = streamer.get();
  store.source = std::move(streamer);
  return store;
}

}  // namespace shoal
