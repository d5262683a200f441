// Properties of every plan, over many models, and what is refused.
#include "shard/shard_plan.h"

#include <map>
#include <numeric>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "shard/tensor_names.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;

// Names, shapes and types without data: all that a plan reads.
class FakeCheckpoint final : public Checkpoint {
 public:
  FakeCheckpoint(const ModelConfig& config, const std::function<DType(const TensorSpec&)>& type) {
    const auto add = [&](const TensorSpec& spec) {
      if (config.tied_embeddings && spec.role == Role::kHead) return;
      TensorInfo t;
      t.name = spec.name;
      t.dims = spec.dims;
      t.type = spec.dims.size() == 1 ? DType::kF32 : type(spec);
      if (t.cols() % Info(t.type).block_elems != 0) t.type = DType::kF16;
      t.bytes = RowBytes(t.type, t.cols()) * t.rows() * t.matrices();
      tensors_.push_back(t);
    };
    for (const TensorSpec& spec : GlobalTensors(config)) add(spec);
    for (int layer = 0; layer < config.layers; ++layer) {
      for (const TensorSpec& spec : LayerTensors(config, layer)) add(spec);
      if (config.experts == 0) continue;
      for (const Role r : {Role::kGate, Role::kUp, Role::kDown}) {
        add(StackedExperts(config, r, layer));
      }
    }
    for (const TensorInfo& t : tensors_) index_[t.name] = &t;
  }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  const TensorInfo* FindTensor(const std::string& name) const override {
    const auto it = index_.find(name);
    return it == index_.end() ? nullptr : it->second;
  }
  const MetadataValue* FindMetadata(const std::string& key) const override { return nullptr; }
  std::vector<std::string> MetadataKeys() const override { return {}; }
  absl::Status Read(const TensorInfo& tensor, int64_t begin, int64_t n,
                    uint8_t* out) const override {
    return absl::InternalError("a plan reads no data");
  }
  std::vector<std::string> Files() const override { return {"fake"}; }
  int64_t TotalBytes() const override { return 0; }

 private:
  std::vector<TensorInfo> tensors_;
  std::map<std::string, const TensorInfo*> index_;
};

ModelConfig Config(int layers, int dim, int heads, int kv_heads, int head_dim, int ffn, int vocab) {
  ModelConfig c;
  c.architecture = "llama";
  c.layers = layers;
  c.dim = dim;
  c.heads = heads;
  c.kv_heads = kv_heads;
  c.head_dim = head_dim;
  c.ffn = ffn;
  c.vocab = vocab;
  return c;
}

absl::StatusOr<ShardPlan> PlanOf(const ModelConfig& c, DType type, const ShardRequest& request) {
  return MakeShardPlan(c, FakeCheckpoint(c, [&](const TensorSpec&) { return type; }), request);
}

void ExpectTiles(const std::vector<Extent>& extents, int64_t total) {
  int64_t at = 0;
  for (const Extent& e : extents) {
    EXPECT_EQ(e.begin, at);
    EXPECT_GT(e.size(), 0);
    at = e.end;
  }
  EXPECT_EQ(at, total);
}

// Everything once, KV heads where they are needed, cuts where the types allow them.
void CheckPlan(const ModelConfig& c, const Checkpoint& checkpoint, const ShardRequest& request,
               const ShardPlan& plan) {
  ASSERT_EQ(static_cast<int>(plan.ranks.size()), request.tp * request.pp);
  std::vector<Extent> stages;
  for (int s = 0; s < plan.pp; ++s) {
    std::vector<Extent> q, ffn, vocab;
    for (int i = 0; i < plan.tp; ++i) {
      const RankPlan& r = plan.ranks[s * plan.tp + i];
      EXPECT_EQ(r.rank, s * plan.tp + i);
      EXPECT_EQ(r.stage, s);
      EXPECT_EQ(r.tp_index, i);
      EXPECT_EQ(r.first_stage, s == 0);
      EXPECT_EQ(r.last_stage, s == plan.pp - 1);
      EXPECT_EQ(r.layers, plan.ranks[s * plan.tp].layers);
      q.push_back(r.q_heads);
      ffn.push_back(r.ffn);
      vocab.push_back(r.vocab);
      for (int64_t h = r.q_heads.begin; h < r.q_heads.end; ++h) {
        EXPECT_GE(h / c.group(), r.kv_heads.begin);
        EXPECT_LT(h / c.group(), r.kv_heads.end);
      }
      EXPECT_EQ(r.kv_heads.begin, r.q_heads.begin / c.group()) << "a KV head nobody needs";
      EXPECT_EQ(r.kv_heads.end, (r.q_heads.end - 1) / c.group() + 1) << "a KV head nobody needs";
      for (int64_t layer = r.layers.begin; layer < r.layers.end; ++layer) {
        const std::string blk = "blk." + std::to_string(layer) + ".";
        const TensorInfo* o = checkpoint.FindTensor(blk + "attn_output.weight");
        const TensorInfo* down = checkpoint.FindTensor(
            blk + (c.experts > 0 ? "ffn_down_exps.weight" : "ffn_down.weight"));
        EXPECT_EQ(r.q_heads.begin * c.head_dim % Info(o->type).cut_elems, 0);
        EXPECT_EQ(r.ffn.begin % Info(down->type).cut_elems, 0);
      }
    }
    ExpectTiles(q, c.heads);
    ExpectTiles(ffn, c.ffn);
    ExpectTiles(vocab, c.vocab);
    stages.push_back(plan.ranks[s * plan.tp].layers);
  }
  ExpectTiles(stages, c.layers);
}

TEST(ShardPlan, EveryPlanCoversTheModelOnce) {
  std::mt19937 random(3);
  const auto pick = [&](int lo, int hi) { return lo + static_cast<int>(random() % (hi - lo + 1)); };
  int made = 0;
  for (int round = 0; round < 1000; ++round) {
    const int kv_heads = pick(1, 8), group = pick(1, 6), head_dim = 8 * pick(1, 16);
    ModelConfig c = Config(pick(1, 12), 32 * pick(1, 8), kv_heads * group, kv_heads, head_dim,
                           pick(0, 3) == 0 ? pick(1, 700) : 32 * pick(1, 60), pick(1, 3000));
    if (pick(0, 3) == 0) c.experts = pick(1, 4);
    c.tied_embeddings = pick(0, 1) == 1;
    const FakeCheckpoint checkpoint(
        c, [&](const TensorSpec&) { return static_cast<DType>(pick(0, kNumDTypes - 1)); });
    ShardRequest request;
    request.tp = pick(1, 7);
    request.pp = pick(1, c.layers);
    if (pick(0, 1) == 1) {
      for (int i = 0; i < request.tp; ++i) request.split.push_back(0.1 * pick(1, 60));
    }
    const auto plan = MakeShardPlan(c, checkpoint, request);
    if (!plan.ok()) {  // too many ranks for this model: the message must say what it allows
      EXPECT_EQ(plan.status().code(), absl::StatusCode::kInvalidArgument);
      EXPECT_THAT(std::string(plan.status().message()), HasSubstr("this model allows 1 to"));
      continue;
    }
    ++made;
    CheckPlan(c, checkpoint, request, *plan);
    if (HasFailure()) FAIL() << "round " << round;
  }
  EXPECT_GT(made, 500);
}

TEST(ShardPlan, EqualSharesAreEqual) {
  const ModelConfig c = Config(32, 4096, 32, 8, 128, 14336, 128256);
  const auto plan = PlanOf(c, DType::kQ4_K, {.tp = 2, .pp = 2});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->ranks[0].q_heads, (Extent{0, 16}));
  EXPECT_EQ(plan->ranks[1].kv_heads, (Extent{4, 8}));
  EXPECT_EQ(plan->ranks[0].ffn, (Extent{0, 7168}));
  EXPECT_EQ(plan->ranks[3].vocab, (Extent{64128, 128256}));
  EXPECT_EQ(plan->ranks[0].layers, (Extent{0, 16}));
  EXPECT_EQ(plan->ranks[2].layers, (Extent{16, 32}));
}

TEST(ShardPlan, SplitFollowsTheShares) {
  const ModelConfig c = Config(2, 4096, 32, 8, 128, 14336, 32000);
  const auto plan = PlanOf(c, DType::kQ4_0, {.tp = 2, .split = {3, 1}});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->ranks[0].q_heads, (Extent{0, 24}));
  EXPECT_EQ(plan->ranks[1].q_heads, (Extent{24, 32}));
  EXPECT_EQ(plan->ranks[0].ffn, (Extent{0, 10752}));
  EXPECT_EQ(plan->ranks[0].vocab, (Extent{0, 24000}));
}

TEST(ShardPlan, TinyShareStillGetsSomething) {
  const ModelConfig c = Config(2, 64, 8, 4, 8, 172, 512);
  const auto plan = PlanOf(c, DType::kF32, {.tp = 3, .split = {1000, 1, 1}});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->ranks[0].q_heads.size(), 6);
  EXPECT_EQ(plan->ranks[1].q_heads.size(), 1);
  EXPECT_EQ(plan->ranks[2].q_heads.size(), 1);
}

TEST(ShardPlan, KvHeadsAreReplicatedOnlyWhenNeeded) {
  const ModelConfig c = Config(1, 512, 8, 2, 64, 512, 512);
  const auto four = PlanOf(c, DType::kF16, {.tp = 4});
  ASSERT_TRUE(four.ok());
  EXPECT_EQ(four->ranks[0].kv_heads, (Extent{0, 1}));
  EXPECT_EQ(four->ranks[1].kv_heads, (Extent{0, 1}));
  EXPECT_EQ(four->ranks[2].kv_heads, (Extent{1, 2}));
  // 12 heads over 5 ranks in groups of 3: runs of 3, 3, 3, 3 leave one rank without; runs of 2 or 3
  // do not.
  const auto five = PlanOf(Config(1, 512, 12, 4, 64, 512, 512), DType::kF16, {.tp = 5});
  ASSERT_TRUE(five.ok());
  for (const RankPlan& r : five->ranks) EXPECT_LE(r.q_heads.size(), 3);
}

TEST(ShardPlan, HeadRunsFitTheBlocksOfTheOutputProjection) {
  // Four heads of 8 make one block of 32.
  const ModelConfig c = Config(1, 64, 8, 4, 8, 256, 512);
  const auto two = PlanOf(c, DType::kQ8_0, {.tp = 2});
  ASSERT_TRUE(two.ok()) << two.status();
  EXPECT_EQ(two->ranks[0].q_heads, (Extent{0, 4}));
  const absl::Status s = PlanOf(c, DType::kQ8_0, {.tp = 3}).status();
  EXPECT_EQ(s.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(s.message()), HasSubstr("allows 1 to 2"));
  EXPECT_THAT(std::string(s.message()), HasSubstr("8 query heads can be cut into 2 runs"));
}

TEST(ShardPlan, FfnOfAnOddSizeIsCutWhereFloatsAllow) {
  const auto plan = PlanOf(Config(1, 64, 8, 4, 8, 172, 512), DType::kF32, {.tp = 7});
  ASSERT_TRUE(plan.ok()) << plan.status();
  for (const RankPlan& r : plan->ranks) EXPECT_LE(r.ffn.size(), 32);
}

TEST(ShardPlan, StagesAreBalancedByBytesWithEmbeddingAndHead) {
  // The head alone weighs as much as ten layers.
  ModelConfig c = Config(20, 64, 4, 4, 16, 64, 0);
  const int64_t layer = 4 * 64 * 64 + 3 * 64 * 64 + 2 * 64;
  c.vocab = static_cast<int>(10 * layer / 64);
  const auto plan = PlanOf(c, DType::kF32, {.pp = 4});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->ranks[0].layers, (Extent{0, 1}));
  EXPECT_EQ(plan->ranks[3].layers, (Extent{19, 20}));
  EXPECT_EQ(plan->ranks[1].layers, (Extent{1, 10}));
}

std::vector<int64_t> StageSizes(const ShardPlan& plan) {
  std::vector<int64_t> sizes;
  for (int s = 0; s < plan.pp; ++s) sizes.push_back(plan.ranks[s * plan.tp].layers.size());
  return sizes;
}

TEST(ShardPlan, StagesTakeTheLayersThatWereGiven) {
  const ModelConfig c = Config(10, 64, 8, 4, 32, 512, 512);
  const auto plan = PlanOf(c, DType::kF32, {.tp = 2, .pp = 3, .stage_layers = {7, 1, 2}});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(StageSizes(*plan), (std::vector<int64_t>{7, 1, 2}));
  EXPECT_EQ(plan->ranks[5].layers, (Extent{8, 10}));
  EXPECT_TRUE(plan->ranks[5].last_stage);
}

TEST(ShardPlan, StagesFillUnequalMemoryEqually) {
  const ModelConfig c = Config(36, 64, 8, 4, 32, 512, 16);
  const auto plan = PlanOf(c, DType::kF32, {.pp = 2, .stage_shares = {24e9, 12e9}});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(StageSizes(*plan), (std::vector<int64_t>{24, 12}));
  // A sliver of memory still holds a layer.
  const auto sliver = PlanOf(c, DType::kF32, {.pp = 3, .stage_shares = {1e9, 1, 1e9}});
  ASSERT_TRUE(sliver.ok()) << sliver.status();
  EXPECT_EQ(StageSizes(*sliver)[1], 1);
}

TEST(BalanceByMemory, UnequalGpusGetUnequalParts) {
  constexpr int64_t kGb = 1'000'000'000;
  ShardRequest pipeline{.pp = 2};
  BalanceByMemory({23 * kGb, 24 * kGb}, false, pipeline);  // what a desktop takes of one of them
  EXPECT_TRUE(pipeline.stage_shares.empty());
  BalanceByMemory({24 * kGb, 8 * kGb}, false, pipeline);
  EXPECT_EQ(pipeline.stage_shares, (std::vector<double>{24e9, 8e9}));
  ShardRequest given{.pp = 2, .stage_layers = {3, 1}};  // the user knows better
  BalanceByMemory({24 * kGb, 8 * kGb}, false, given);
  EXPECT_TRUE(given.stage_shares.empty());

  ShardRequest tensor{.tp = 2};
  BalanceByMemory({24 * kGb, 8 * kGb}, false, tensor);
  EXPECT_TRUE(tensor.split.empty());
  BalanceByMemory({24 * kGb, 8 * kGb}, true, tensor);
  EXPECT_EQ(tensor.split, (std::vector<double>{24e9, 8e9}));

  // Two stages of two: equal shares fill a stage when its smallest GPU is full.
  ShardRequest both{.tp = 2, .pp = 2};
  BalanceByMemory({24 * kGb, 8 * kGb, 16 * kGb, 16 * kGb}, false, both);
  EXPECT_EQ(both.stage_shares, (std::vector<double>{8e9, 16e9}));
  both.stage_shares.clear();
  BalanceByMemory({24 * kGb, 8 * kGb, 16 * kGb, 16 * kGb}, true, both);
  EXPECT_EQ(both.split, (std::vector<double>{16e9, 8e9}));
  EXPECT_TRUE(both.stage_shares.empty());  // 32 GB each
}

TEST(ShardPlanBadRequest, SaysWhatWasAskedAndWhatIsAllowed) {
  const ModelConfig c = Config(4, 64, 8, 4, 32, 512, 512);
  const auto refused = [&](const ShardRequest& request, const std::string& text) {
    const absl::Status s = PlanOf(c, DType::kF32, request).status();
    EXPECT_EQ(s.code(), absl::StatusCode::kInvalidArgument) << s;
    EXPECT_THAT(std::string(s.message()), HasSubstr(text));
  };
  refused({.tp = 9}, "tensor parallelism of 9 was asked for, this model allows 1 to 8");
  refused({.tp = 0}, "this model allows 1 to 8");
  refused({.pp = 5}, "5 pipeline stages were asked for, this model allows 1 to 4");
  refused({.pp = -1}, "pipeline stages");
  refused({.tp = 2, .split = {1}}, "the split 1 has 1 shares, expected 2");
  refused({.tp = 2, .split = {1, 0}}, "the share 0");
  refused({.tp = 2, .split = {1, -3}}, "the share -3");
  refused({.tp = 2, .split = {1, NAN}}, "positive");
  refused({.tp = 2, .split = {1, INFINITY}}, "positive");
  refused({.pp = 2, .stage_layers = {4}}, "the stages have 4 layers, expected 2 numbers");
  refused({.pp = 2, .stage_layers = {1, 2}}, "the stages have 1,2 layers");
  refused({.pp = 2, .stage_layers = {5, -1}}, "that make up the model's 4");
  refused({.pp = 2, .stage_shares = {1}}, "the stages have the shares 1, expected 2");
  refused({.pp = 2, .stage_shares = {1, 0}}, "positive");
}

}  // namespace
}  // namespace shoal
