#include "shard/weight_layout.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/status_macros.h"
#include "shard/tensor_names.h"

namespace shoal {
namespace {

constexpr int64_t kUnitAlignment = 4096;  // a page: units are read and released by themselves
constexpr int64_t kExtentAlignment = 64;  // a cache line and an AVX-512 register

int64_t AlignUp(int64_t n, int64_t alignment) { return (n + alignment - 1) & ~(alignment - 1); }

// Appends units and extents, keeping the offsets.
class LayoutBuilder {
 public:
  void BeginUnit(WeightUnit::Kind kind, int layer, int expert) {
    WeightUnit unit;
    unit.kind = kind;
    unit.layer = layer;
    unit.expert = expert;
    unit.offset = AlignUp(layout_.bytes, kUnitAlignment);
    layout_.bytes = unit.offset;
    layout_.units.push_back(std::move(unit));
  }

  // Columns of a vector, or of one of stacked ones; from row 0 also columns of all behind each
  // other.
  void AddVector(Role role, const TensorInfo& t, int64_t row, Extent cols) {
    WeightExtent e;
    e.row_begin = row;
    e.col_begin = cols.begin;
    e.shape.type = DType::kF32;
    e.shape.cols = cols.size();
    Add(role, t, std::move(e), cols.size() * static_cast<int64_t>(sizeof(float)));
  }

  void AddMatrix(Role role, const TensorInfo& t, int64_t matrix, Extent rows, Extent cols) {
    WeightExtent e;
    e.matrix = matrix;
    e.row_begin = rows.begin;
    e.col_begin = cols.begin;
    e.shape = MakePackedShape(t.type, rows.size(), cols.begin, cols.size());
    const int64_t bytes = e.shape.bytes();
    Add(role, t, std::move(e), bytes);
  }

  WeightLayout Finish() {
    layout_.bytes = AlignUp(layout_.bytes, kUnitAlignment);
    return std::move(layout_);
  }

 private:
  void Add(Role role, const TensorInfo& t, WeightExtent e, int64_t bytes) {
    WeightUnit& unit = layout_.units.back();
    e.role = role;
    e.tensor = t.name;
    e.offset = AlignUp(unit.bytes, kExtentAlignment);
    e.bytes = bytes;
    unit.bytes = e.offset + bytes;
    layout_.bytes = unit.offset + unit.bytes;
    unit.extents.push_back(std::move(e));
  }

  WeightLayout layout_;
};

// The columns of a layer's FFN, or of its experts, that a rank holds.
const Extent& FfnOf(const ModelConfig& c, const RankPlan& r, int layer) {
  return c.experts > 0 && !c.has_experts(layer) ? r.dense_ffn : r.ffn;
}

// The part of a tensor with this role that a rank holds.
struct Slice {
  bool held = true;
  Extent rows;  // unused for vectors
  Extent cols;
};

Slice SliceOf(const ModelConfig& c, const RankPlan& r, Role role, int layer) {
  const auto heads = [&](const Extent& e) {
    return Extent{e.begin * c.head_dim, e.end * c.head_dim};
  };
  const Extent dim{0, c.dim};
  switch (role) {
    case Role::kEmbedding:
    case Role::kHead:
      return {true, r.vocab, dim};
    case Role::kOutputNorm:
    case Role::kAttnNorm:
    case Role::kFfnNorm:
    case Role::kAttnPostNorm:
    case Role::kFfnPostNorm:
      return {true, {}, dim};
    case Role::kQ:
      return {true, heads(r.q_heads), dim};
    case Role::kK:
    case Role::kV:
      return {true, heads(r.kv_heads), dim};
    case Role::kO:
      return {true, dim, heads(r.q_heads)};
    case Role::kQBias:
      return {true, {}, heads(r.q_heads)};
    case Role::kKBias:
    case Role::kVBias:
      return {true, {}, heads(r.kv_heads)};
    case Role::kOBias:
    case Role::kDownBias:
      return {r.tp_index == 0, {}, dim};
    case Role::kSinks:
      return {true, {}, r.q_heads};
    case Role::kRouterBias:
    case Role::kChoiceBias:
      return {true, {}, {0, c.experts}};
    case Role::kGateBias:
    case Role::kUpBias:
      return {true, {}, r.ffn};
    case Role::kQNorm:
      return {true, {}, NormsHeadsAlike(c.qk_norm) ? Extent{0, c.head_dim} : heads(r.q_heads)};
    case Role::kKNorm:
      return {true, {}, NormsHeadsAlike(c.qk_norm) ? Extent{0, c.head_dim} : heads(r.kv_heads)};
    case Role::kGate:
    case Role::kUp:
      return {true, FfnOf(c, r, layer), dim};
    case Role::kDown:
      return {true, dim, FfnOf(c, r, layer)};
    case Role::kSharedGate:
    case Role::kSharedUp:
      return {true, r.shared_ffn, dim};
    case Role::kSharedDown:
      return {true, dim, r.shared_ffn};
    case Role::kRouter:
      return {true, {0, c.experts}, dim};
  }
  SHOAL_CHECK(false, "every role has a slice");
  return {};
}

class LayoutMaker {
 public:
  LayoutMaker(const Checkpoint& checkpoint, const ModelConfig& config, const RankPlan& rank)
      : checkpoint_(checkpoint), config_(config), rank_(rank) {}

  absl::StatusOr<WeightLayout> Make() {
    const std::vector<TensorSpec> globals = GlobalTensors(config_);
    if (rank_.first_stage) {
      builder_.BeginUnit(WeightUnit::Kind::kEmbedding, -1, -1);
      SHOAL_RETURN_IF_ERROR(Add(globals[0]));
    }
    for (int64_t layer = rank_.layers.begin; layer < rank_.layers.end; ++layer) {
      SHOAL_RETURN_IF_ERROR(AddLayer(static_cast<int>(layer)));
    }
    if (rank_.last_stage) {
      builder_.BeginUnit(WeightUnit::Kind::kHead, -1, -1);
      SHOAL_RETURN_IF_ERROR(Add(globals[1]));
      TensorSpec head = globals[2];
      head.required = true;
      if (config_.tied_embeddings) head.name = globals[0].name;
      if (!config_.tied_embeddings || !rank_.first_stage) SHOAL_RETURN_IF_ERROR(Add(head));
    }
    return builder_.Finish();
  }

 private:
  absl::Status AddLayer(int layer) {
    layer_ = layer;
    const bool moe = config_.has_experts(layer);
    builder_.BeginUnit(WeightUnit::Kind::kAttention, layer, -1);
    for (const TensorSpec& spec : LayerTensors(config_, layer)) {
      if (spec.role == Role::kFfnNorm) {
        builder_.BeginUnit(moe ? WeightUnit::Kind::kRouter : WeightUnit::Kind::kFfn, layer, -1);
      }
      if (spec.role == Role::kSharedGate) builder_.BeginUnit(WeightUnit::Kind::kFfn, layer, -1);
      SHOAL_RETURN_IF_ERROR(Add(spec));
    }
    for (int e = 0; moe && e < config_.experts; ++e) {
      builder_.BeginUnit(WeightUnit::Kind::kExpert, layer, e);
      for (const Role role : {Role::kGate, Role::kUp, Role::kDown}) {
        const ExpertSource s = FindExpert(checkpoint_, config_, role, layer, e);
        if (s.tensor == nullptr) return Missing(StackedExperts(config_, role, layer).name);
        const Slice slice = SliceOf(config_, rank_, role, layer);
        builder_.AddMatrix(role, *s.tensor, s.matrix, slice.rows, slice.cols);
      }
      for (const TensorSpec& spec : ExpertBiases(config_, layer)) {
        SHOAL_RETURN_IF_ERROR(Add(spec, e));
      }
    }
    return absl::OkStatus();
  }

  // `row`: of stacked vectors.
  absl::Status Add(const TensorSpec& spec, int row = 0) {
    const Slice slice = SliceOf(config_, rank_, spec.role, layer_);
    if (!slice.held) return absl::OkStatus();
    const TensorInfo* t = checkpoint_.FindTensor(spec.name);
    if (t == nullptr) return spec.required ? Missing(spec.name) : absl::OkStatus();
    if (spec.is_vector()) {
      builder_.AddVector(spec.role, *t, row, slice.cols);
    } else {
      const Extent rows = {spec.first_row + slice.rows.begin, spec.first_row + slice.rows.end};
      builder_.AddMatrix(spec.role, *t, 0, rows, slice.cols);
    }
    return absl::OkStatus();
  }

  absl::Status Missing(const std::string& name) const {
    return absl::InvalidArgumentError(
        absl::StrCat(checkpoint_.Files()[0], ": tensor '", name, "' is missing"));
  }

  const Checkpoint& checkpoint_;
  const ModelConfig& config_;
  const RankPlan& rank_;
  int layer_ = -1;
  LayoutBuilder builder_;
};

}  // namespace

const WeightExtent* WeightUnit::Find(Role role) const {
  for (const WeightExtent& e : extents) {
    if (e.role == role) return &e;
  }
  return nullptr;
}

absl::StatusOr<WeightLayout> MakeWeightLayout(const Checkpoint& checkpoint,
                                              const ModelConfig& config, const RankPlan& rank) {
  return LayoutMaker(checkpoint, config, rank).Make();
}

}  // namespace shoal
