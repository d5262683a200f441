// Where the plan puts weights, and that the store gives the same bytes wherever they are.
#include "shard/placement.h"

#include <cstring>
#include <fstream>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "shard/shard_file.h"
#include "shard/weight_store.h"
#include "tests/shard/gguf_writer.h"
#include "tests/shard/temp_dir.h"

namespace shoal {
namespace {

constexpr int kRows = 64;

// A layout of the sizes of an 8B model, without its bytes.
WeightLayout LargeLayout(int layers, int experts) {
  WeightLayout layout;
  const auto add = [&](WeightUnit::Kind kind, int layer, int expert, Role role, int64_t mib) {
    WeightUnit u;
    u.kind = kind;
    u.layer = layer;
    u.expert = expert;
    u.offset = layout.bytes;
    WeightExtent e;
    e.role = role;
    e.shape = MakePackedShape(DType::kQ8_0, mib * (1 << 20) / 4352, 0, 4096);
    u.bytes = e.bytes = e.shape.bytes();
    u.extents.push_back(e);
    layout.bytes += (u.bytes + 4095) / 4096 * 4096;
    layout.units.push_back(u);
  };
  add(WeightUnit::Kind::kEmbedding, -1, -1, Role::kEmbedding, 128);
  for (int l = 0; l < layers; ++l) {
    add(WeightUnit::Kind::kAttention, l, -1, Role::kQ, 28);
    if (experts > 0) {
      add(WeightUnit::Kind::kRouter, l, -1, Role::kRouter, 1);
      for (int e = 0; e < experts; ++e) add(WeightUnit::Kind::kExpert, l, e, Role::kGate, 40);
    } else {
      add(WeightUnit::Kind::kFfn, l, -1, Role::kGate, 121);
    }
  }
  add(WeightUnit::Kind::kHead, -1, -1, Role::kHead, 128);
  return layout;
}

ModelConfig Config(int experts) {
  ModelConfig c;
  c.experts = experts;
  c.experts_used = experts > 0 ? 2 : 0;
  return c;
}

int64_t Held(const WeightLayout& layout, const Placement& p, Tier tier) {
  int64_t bytes = 0;
  for (size_t i = 0; i < layout.units.size(); ++i) {
    if (p.tiers[i] == tier) bytes += (layout.units[i].bytes + 4095) / 4096 * 4096;
  }
  return bytes;
}

TEST(Placement, NeverStreamsWhatFits) {
  const WeightLayout layout = LargeLayout(32, 0);
  const auto p = PlaceWeights(layout, Config(0), layout.bytes, kRows);
  ASSERT_TRUE(p.ok()) << p.status();
  EXPECT_FALSE(p->streams());
  EXPECT_EQ(p->resident_bytes, layout.bytes);
  EXPECT_EQ(p->held_bytes, layout.bytes);
}

TEST(Placement, UsesTheBudgetAndNoByteMore) {
  const WeightLayout layout = LargeLayout(32, 0);
  int64_t resident_before = -1;
  for (double share : {0.15, 0.25, 0.5, 0.75, 0.9}) {
    const auto budget = static_cast<int64_t>(share * static_cast<double>(layout.bytes));
    const auto p = PlaceWeights(layout, Config(0), budget, kRows);
    ASSERT_TRUE(p.ok()) << p.status();
    EXPECT_LE(p->held_bytes, budget);
    // Less than the smallest unit that streams is left over.
    EXPECT_GT(p->held_bytes, budget - (29 << 20));
    EXPECT_GE(p->resident_bytes, resident_before);
    resident_before = p->resident_bytes;
    EXPECT_EQ(p->streamed_bytes, Held(layout, *p, Tier::kStreamed));
    EXPECT_EQ(p->tiers[0], Tier::kRows);  // the embedding costs its rows only
    EXPECT_TRUE(std::is_sorted(p->cycle.begin(), p->cycle.end()));
    EXPECT_EQ(p->resident_bytes + p->streamed_bytes + Held(layout, *p, Tier::kRows), layout.bytes);
  }
}

// The disk must not wait for a long run of resident units: whatever the run of the pass, the
// streamed share in it is about that of the whole.
TEST(Placement, SpreadsStreamedUnitsEvenly) {
  const WeightLayout layout = LargeLayout(32, 0);
  for (double share : {0.4, 0.6, 0.8}) {
    const auto p = PlaceWeights(
        layout, Config(0), static_cast<int64_t>(share * static_cast<double>(layout.bytes)), kRows);
    ASSERT_TRUE(p.ok());
    const double overall =
        static_cast<double>(p->streamed_bytes) / static_cast<double>(layout.bytes);
    double total = 0, streamed = 0, worst = 0;
    for (size_t i = 1; i < layout.units.size(); ++i) {
      total += static_cast<double>(layout.units[i].bytes);
      if (p->tiers[i] == Tier::kStreamed) streamed += static_cast<double>(layout.units[i].bytes);
      worst = std::max(worst, std::abs(streamed - overall * total));
    }
    EXPECT_LT(worst, 4.0 * (121 << 20)) << share;
  }
}

// The head is three times a layer's part: as a streamed part it would make the ring, which keeps no
// weights, three times as large.
TEST(Placement, ALargeHeadStaysSoThatTheRingIsSmall) {
  WeightLayout layout = LargeLayout(32, 0);
  WeightUnit& head = layout.units.back();
  head.bytes = head.extents[0].bytes = int64_t{360} << 20;
  layout.bytes = head.offset + head.bytes;
  const auto p = PlaceWeights(layout, Config(0), int64_t{2} << 30, kRows);
  ASSERT_TRUE(p.ok()) << p.status();
  EXPECT_EQ(p->tiers.back(), Tier::kResident);
  EXPECT_LE(p->ring_bytes, int64_t{2 * 122} << 20);
  // Where nothing else fits, it streams like the others.
  const int64_t least = LeastWeightBytes(layout, Config(0), kRows);
  EXPECT_LT(least, int64_t{380} << 20);
  const auto tight = PlaceWeights(layout, Config(0), least, kRows);
  ASSERT_TRUE(tight.ok()) << tight.status();
  EXPECT_EQ(tight->tiers.back(), Tier::kStreamed);
}

// Without the embedding, of which only rows are read, everything may fit: nothing streams then.
TEST(Placement, TheEmbeddingGivesWayFirst) {
  const WeightLayout layout = LargeLayout(32, 0);
  const auto p = PlaceWeights(layout, Config(0), layout.bytes - (int64_t{64} << 20), kRows);
  ASSERT_TRUE(p.ok()) << p.status();
  EXPECT_EQ(p->tiers[0], Tier::kRows);
  EXPECT_EQ(p->streamed_bytes, 0);
  EXPECT_EQ(p->ring_bytes, 0);
}

TEST(Placement, TooSmallABudgetNamesTheLeastThatWorks) {
  const WeightLayout layout = LargeLayout(32, 0);
  const int64_t least = LeastWeightBytes(layout, Config(0), kRows);
  EXPECT_LT(least, 300 << 20);
  EXPECT_TRUE(PlaceWeights(layout, Config(0), least, kRows).ok());
  const absl::Status s = PlaceWeights(layout, Config(0), least - 1, kRows).status();
  EXPECT_EQ(s.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(s.message()), testing::HasSubstr(absl::StrCat(least)));
}

TEST(Placement, WithExpertsTheSharedPartsStayFirst) {
  const WeightLayout layout = LargeLayout(16, 8);
  const auto p = PlaceWeights(layout, Config(8), int64_t{2} << 30, kRows);
  ASSERT_TRUE(p.ok()) << p.status();
  EXPECT_EQ(p->streamed_bytes, 0);
  EXPECT_GE(p->expert_slots, 8);  // a prompt may choose all of a layer
  EXPECT_LE(p->held_bytes, int64_t{2} << 30);
  // Two of eight experts of 40 MiB in 16 layers, less what stays.
  EXPECT_LT(p->demand_bytes, int64_t{16 * 2 * 40} << 20);
  EXPECT_GT(p->demand_bytes, int64_t{16 * 2 * 40 / 2} << 20);
}

TEST(Placement, ACacheBelowOneCycleOfExpertsIsNotUsed) {
  const WeightLayout layout = LargeLayout(16, 8);
  const int64_t least = LeastWeightBytes(layout, Config(8), kRows) + (int64_t{16 * 28 + 128} << 20);
  const auto small = PlaceWeights(layout, Config(8), least + (int64_t{20 * 40} << 20), kRows);
  EXPECT_EQ(small->expert_slots, 8);
  EXPECT_GT(Held(layout, *small, Tier::kResident), least);
  const auto large = PlaceWeights(layout, Config(8), least + (int64_t{90 * 40} << 20), kRows);
  EXPECT_GT(large->expert_slots, 64);
}

class WeightStoreTest : public testing::Test {
 protected:
  void Open(const TinyModel& model) {
    TinyModelGguf(model).WriteTo(temp_.File("m.gguf"));
    checkpoint_ = *OpenCheckpoint(temp_.File("m.gguf"));
    config_ = *ReadModelConfig(*checkpoint_);
    plan_ = *MakeShardPlan(config_, *checkpoint_, {1, 1, {}});
    layout_ = *MakeWeightLayout(*checkpoint_, config_, plan_.ranks[0]);
    loaded_.resize(layout_.bytes);
    ASSERT_TRUE(LoadAll(*checkpoint_, layout_, 1, loaded_.data(), nullptr).ok());
  }
  // Every unit, twice over, against what LoadUnit makes.
  void ExpectAllUnits(WeightSource& source) {
    for (int pass = 0; pass < 2; ++pass) {
      for (size_t i = 0; i < layout_.units.size(); ++i) {
        const WeightUnit& u = layout_.units[i];
        const uint8_t* want = loaded_.data() + u.offset;
        const bool embedding = u.kind == WeightUnit::Kind::kEmbedding;
        const int32_t row = 37;
        const auto got = embedding ? source.AcquireRows(static_cast<int>(i), {row, -1})
                                   : source.Acquire(static_cast<int>(i));
        ASSERT_TRUE(got.ok()) << got.status();
        if (embedding) {
          const int64_t panel = u.extents[0].shape.panel_bytes(), at = row / kPanelRows * panel;
          ASSERT_EQ(memcmp(*got + at, &want[at], panel), 0);
        } else {
          for (const WeightExtent& e : u.extents) {
            ASSERT_EQ(memcmp(*got + e.offset, &want[e.offset], e.bytes), 0) << UnitName(u);
          }
        }
        source.Release(static_cast<int>(i));
      }
    }
  }
  // Units of 1 MiB and more stream; the rest is small.
  static TinyModel Streamable() {
    TinyModel m;
    m.layers = 3;
    m.type = DType::kF16;
    m.ffn = 2048;
    m.dim = 512;
    m.heads = 16;
    m.vocab = 1024;
    return m;
  }

  TempDir temp_;
  std::unique_ptr<Checkpoint> checkpoint_;
  ModelConfig config_;
  ShardPlan plan_;
  WeightLayout layout_;
  std::vector<uint8_t> loaded_;  // all units, as LoadAll makes them
};

TEST_F(WeightStoreTest, SameBytesInMemoryFromShardsAndFromTheGguf) {
  Open(Streamable());
  ASSERT_TRUE(WriteShards(*checkpoint_, config_, temp_.File("s"), {}).ok());
  const auto shards = OpenCheckpoint(temp_.File("s"));
  ASSERT_TRUE(shards.ok());
  const int64_t least = LeastWeightBytes(layout_, config_, kRows);
  ASSERT_LT(least, layout_.bytes / 2);
  for (int64_t budget : {least, layout_.bytes / 2, layout_.bytes * 3 / 4, layout_.bytes}) {
    const auto p = PlaceWeights(layout_, config_, budget, kRows);
    ASSERT_TRUE(p.ok()) << p.status();
    EXPECT_EQ(p->streams(), budget < layout_.bytes);
    for (const Checkpoint* c : {checkpoint_.get(), shards->get()}) {
      auto store = OpenWeights(*c, layout_, *p, {});
      ASSERT_TRUE(store.ok()) << store.status();
      ExpectAllUnits(*store->source);
    }
  }
}

TEST_F(WeightStoreTest, TiedEmbeddingIsReadByRowsAndStreamedAsHead) {
  TinyModel m = Streamable();
  m.tied = true;
  Open(m);
  ASSERT_TRUE(WriteShards(*checkpoint_, config_, temp_.File("s"), {}).ok());
  const auto shards = OpenCheckpoint(temp_.File("s"));
  const auto p = PlaceWeights(layout_, config_, LeastWeightBytes(layout_, config_, kRows), kRows);
  ASSERT_TRUE(p.ok()) << p.status();
  ASSERT_EQ(p->tiers[0], Tier::kStreamed);
  EXPECT_EQ(p->cycle.back(), 0);
  auto store = OpenWeights(**shards, layout_, *p, {});
  ASSERT_TRUE(store.ok()) << store.status();
  ExpectAllUnits(*store->source);
  std::vector<uint8_t> want(layout_.units[0].bytes);
  ASSERT_TRUE(LoadUnit(*checkpoint_, layout_.units[0], want.data()).ok());
  for (int pass = 0; pass < 2; ++pass) {
    const auto rows = store->source->AcquireRows(0, {5});
    ASSERT_TRUE(rows.ok());
    store->source->Release(0);
    const auto whole = store->source->Acquire(0);
    ASSERT_TRUE(whole.ok()) << whole.status();
    EXPECT_EQ(memcmp(*whole, want.data(), want.size()), 0);
    store->source->Release(0);
  }
}

TEST_F(WeightStoreTest, ExpertsOnDemand) {
  TinyModel m = Streamable();
  m.experts = 4;
  Open(m);
  ASSERT_TRUE(WriteShards(*checkpoint_, config_, temp_.File("s"), {}).ok());
  const auto shards = OpenCheckpoint(temp_.File("s"));
  const auto p = PlaceWeights(layout_, config_, LeastWeightBytes(layout_, config_, kRows), kRows);
  ASSERT_TRUE(p.ok()) << p.status();
  for (const Checkpoint* c : {checkpoint_.get(), shards->get()}) {
    auto store = OpenWeights(*c, layout_, *p, {});
    ASSERT_TRUE(store.ok()) << store.status();
    ExpectAllUnits(*store->source);
  }
}

TEST_F(WeightStoreTest, DamageIsFoundTheFirstTimeTheUnitIsUsed) {
  Open(Streamable());
  ASSERT_TRUE(WriteShards(*checkpoint_, config_, temp_.File("s"), {}).ok());
  const auto shards = OpenCheckpoint(temp_.File("s"));
  const auto p = PlaceWeights(layout_, config_, LeastWeightBytes(layout_, config_, kRows), kRows);
  const int unit = p->cycle[1];
  {
    std::fstream f(temp_.File("s") + "/rank-000.shard",
                   std::ios::binary | std::ios::in | std::ios::out);
    f.seekp(kShardDataOffset + layout_.units[unit].offset + 100);
    f.put('\x55');
  }
  auto store = OpenWeights(**shards, layout_, *p, {});
  ASSERT_TRUE(store.ok()) << store.status();
  ASSERT_TRUE(store->source->Acquire(p->cycle[0]).ok());
  store->source->Release(p->cycle[0]);
  const auto bad = store->source->Acquire(unit);
  EXPECT_EQ(bad.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(bad.status().message()),
              testing::HasSubstr(UnitName(layout_.units[unit])));
}

TEST_F(WeightStoreTest, DamageOfAnEmbeddingThatIsReadByRowsIsFoundAtTheStart) {
  Open(Streamable());
  ASSERT_TRUE(WriteShards(*checkpoint_, config_, temp_.File("s"), {}).ok());
  const auto shards = OpenCheckpoint(temp_.File("s"));
  const auto p = PlaceWeights(layout_, config_, LeastWeightBytes(layout_, config_, kRows), kRows);
  ASSERT_EQ(p->tiers[0], Tier::kRows);
  EXPECT_TRUE(OpenWeights(**shards, layout_, *p, {}).ok());
  {
    std::fstream f(temp_.File("s") + "/rank-000.shard",
                   std::ios::binary | std::ios::in | std::ios::out);
    f.seekp(kShardDataOffset + layout_.units[0].bytes - 100);
    f.put('\x55');
  }
  const absl::Status bad = OpenWeights(**shards, layout_, *p, {}).status();
  EXPECT_EQ(bad.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(bad.message()), testing::HasSubstr("token_embd.weight"));
}

}  // namespace
}  // namespace shoal
