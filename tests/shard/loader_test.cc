// What the ranks of a plan load, put together again, is the model.
#include <unistd.h>

#include <map>

#include "gtest/gtest.h"
#include "kernels/packed_matrix.h"
#include "shard/checkpoint.h"
#include "shard/model_config.h"
#include "shard/shard_plan.h"
#include "shard/tensor_names.h"
#include "shard/weight_layout.h"
#include "tests/shard/gguf_writer.h"
#include "tests/shard/temp_dir.h"

namespace shoal {
namespace {

// One tensor, dequantized, and how many ranks hold each element.
struct Whole {
  std::vector<float> values;
  std::vector<int> held;
};

std::vector<float> Dequantized(const Checkpoint& c, const TensorInfo& t) {
  std::vector<uint8_t> bytes(t.bytes);
  EXPECT_TRUE(c.Read(t, 0, t.bytes, bytes.data()).ok());
  std::vector<float> values(t.cols() * t.rows() * t.matrices());
  DequantizeRow(t.type, bytes.data(), values.data(), static_cast<int64_t>(values.size()));
  return values;
}

class Reassembly {
 public:
  explicit Reassembly(const Checkpoint& c) : checkpoint_(c) {
    for (const TensorInfo& t : c.tensors()) {
      Whole& w = tensors_[t.name];
      w.values = Dequantized(c, t);
      w.held.resize(w.values.size());
    }
  }

  // Compares an extent's bytes with the tensor, and counts its elements.
  void Take(const WeightExtent& e, const uint8_t* data) {
    const TensorInfo& t = *checkpoint_.FindTensor(e.tensor);
    Whole& w = tensors_[e.tensor];
    if (e.is_vector()) {
      Compare(w, e.row_begin * t.cols() + e.col_begin, reinterpret_cast<const float*>(data),
              e.shape.cols, e.tensor);
      return;
    }
    std::vector<float> row(e.shape.cols);
    for (int64_t r = 0; r < e.shape.rows; ++r) {
      DequantizePanelRow(e.shape, data + r / kPanelRows * e.shape.panel_bytes(), r % kPanelRows,
                         row.data());
      const int64_t source = (e.matrix * t.rows() + e.row_begin + r) * t.cols() + e.col_begin;
      Compare(w, source, row.data(), e.shape.cols, e.tensor);
    }
  }

  const std::map<std::string, Whole>& tensors() const { return tensors_; }
  bool same() const { return same_; }

 private:
  void Compare(Whole& w, int64_t begin, const float* got, int64_t n, const std::string& name) {
    for (int64_t i = 0; i < n; ++i) {
      if (got[i] != w.values[begin + i]) {
        if (same_) {
          ADD_FAILURE() << name << " element " << begin + i << ": " << got[i] << ", expected "
                        << w.values[begin + i];
        }
        same_ = false;
      }
      ++w.held[begin + i];
    }
  }

  const Checkpoint& checkpoint_;
  std::map<std::string, Whole> tensors_;
  bool same_ = true;
};

bool Replicated(const std::string& name) {
  for (const char* part : {"norm", "attn_k.", "attn_v.", "gate_inp", "exp_probs_b"}) {
    if (name.find(part) != std::string::npos) return true;
  }
  return false;
}

struct Loaded {
  WeightLayout layout;
  std::vector<uint8_t> bytes;
};

void CheckLayout(const WeightLayout& layout) {
  int64_t end = 0;
  for (const WeightUnit& unit : layout.units) {
    EXPECT_EQ(unit.offset % 4096, 0);
    EXPECT_GE(unit.offset, end);
    end = unit.offset + unit.bytes;
    int64_t extent_end = 0;
    for (const WeightExtent& e : unit.extents) {
      EXPECT_EQ(e.offset % 64, 0);
      EXPECT_GE(e.offset, extent_end);
      EXPECT_EQ(unit.Find(e.role), &e) << "one extent for each role";
      extent_end = e.offset + e.bytes;
    }
    EXPECT_LE(extent_end, unit.bytes);
  }
  EXPECT_LE(end, layout.bytes);
}

class LoaderTest : public ::testing::Test {
 protected:
  std::unique_ptr<Checkpoint> Write(const TinyModel& m) {
    path_ = dir_.File("m.gguf");
    TinyModelGguf(m).WriteTo(path_);
    auto c = OpenCheckpoint(path_);
    EXPECT_TRUE(c.ok()) << c.status();
    return *std::move(c);
  }

  // Loads every rank of the plan and compares.
  void CheckRequest(const Checkpoint& c, const ShardRequest& request) {
    const auto config = ReadModelConfig(c);
    ASSERT_TRUE(config.ok()) << config.status();
    const auto plan = MakeShardPlan(*config, c, request);
    ASSERT_TRUE(plan.ok()) << plan.status();
    Reassembly whole(c);
    for (const RankPlan& rank : plan->ranks) {
      const auto layout = MakeWeightLayout(c, *config, rank);
      ASSERT_TRUE(layout.ok()) << layout.status();
      CheckLayout(*layout);
      std::vector<uint8_t> bytes(layout->bytes, 0xEE);
      int64_t done = 0, total = 0;
      const absl::Status s = LoadAll(c, *layout, 2, bytes.data(),
                                     [&](int64_t now, int64_t of) { done = now, total = of; });
      ASSERT_TRUE(s.ok()) << s;
      EXPECT_EQ(done, total);
      for (const WeightUnit& unit : layout->units) {
        for (const WeightExtent& e : unit.extents) {
          whole.Take(e, bytes.data() + unit.offset + e.offset);
        }
        if (request.tp != 2) continue;
        std::vector<uint8_t> alone(unit.bytes, 0xDD);
        ASSERT_TRUE(LoadUnit(c, unit, alone.data()).ok());
        ASSERT_TRUE(std::equal(alone.begin(), alone.end(), bytes.begin() + unit.offset));
      }
    }
    ASSERT_TRUE(whole.same());
    for (const auto& [name, w] : whole.tensors()) {
      const std::string unused = "blk." + std::to_string(config->layers) + ".";
      if (name == kRopeFactorsName || name.starts_with(unused)) continue;
      const bool twice = config->tied_embeddings && request.pp > 1 && name == "token_embd.weight";
      const bool shared = config->parallel_ffn && name.ends_with("attn_norm.weight");  // two units
      const int most = (Replicated(name) ? request.tp : (twice ? 2 : 1)) * (shared ? 2 : 1);
      for (const int held : w.held) {
        ASSERT_GE(held, twice ? 2 : 1) << name;
        ASSERT_LE(held, most) << name;
      }
    }
  }

  TempDir dir_;
  std::string path_;
};

class LoaderTypeTest : public LoaderTest, public ::testing::WithParamInterface<int> {};

TEST_P(LoaderTypeTest, RanksTogetherHoldTheModel) {
  TinyModel m;
  m.type = static_cast<DType>(GetParam());
  m.layers = 1;
  m.kv_heads = 2;
  m.tied = true;
  m.ffn = 256;
  m.vocab = 50;
  const auto c = Write(m);
  for (int tp = 1; tp <= 7; ++tp) CheckRequest(*c, {.tp = tp});
  CheckRequest(*c, {.tp = 2, .split = {3, 1}});
  CheckRequest(*c, {.tp = 3, .split = {1, 5, 2}});
}

INSTANTIATE_TEST_SUITE_P(AllTypes, LoaderTypeTest, ::testing::Range(0, kNumDTypes),
                         [](const auto& info) {
                           return std::string(Info(static_cast<DType>(info.param)).name);
                         });

TEST_F(LoaderTest, EveryArchitectureAndStage) {
  for (const char* architecture : {"llama", "qwen2", "qwen3", "qwen3moe", "gpt-oss", "glm4moe",
                                   "command-r", "cohere2", "minimax-m2", "llama4"}) {
    TinyModel m;
    m.architecture = architecture;
    m.layers = 3;
    m.dim = 64;
    m.head_dim = 16;
    m.ffn = 160;
    m.vocab = 50;
    m.experts = m.architecture.starts_with("qwen3m") || m.architecture.starts_with("g") ||
                        m.architecture == "minimax-m2" || m.architecture == "llama4"
                    ? 3
                    : 0;
    if (m.experts > 0 || m.architecture == "cohere2") m.window = 16;
    m.head_norms = m.architecture == "command-r";
    if (m.architecture == "llama4") m.experts_used = 1;
    m.rope_factors = m.attention_biases = m.architecture == "llama";
    m.type = DType::kQ5_0;
    const auto c = Write(m);
    CheckRequest(*c, {});
    CheckRequest(*c, {.tp = 2, .pp = 2});
    CheckRequest(*c, {.tp = 1, .pp = 3});
  }
}

TEST_F(LoaderTest, FfnOf172AndTiedEmbeddings) {
  TinyModel m;
  m.dim = 64;
  m.head_dim = 8;
  m.ffn = 172;
  m.tied = true;
  for (const DType type : {DType::kF32, DType::kF16}) {
    m.type = type;
    const auto c = Write(m);
    for (int tp = 1; tp <= 7; ++tp) CheckRequest(*c, {.tp = tp});
    CheckRequest(*c, {.tp = 2, .pp = 2});
  }
}

TEST_F(LoaderTest, MixtralStackedAndSeparate) {
  for (const bool separate : {false, true}) {
    TinyModel m;
    m.layers = 1;
    m.dim = 64;
    m.head_dim = 8;
    m.ffn = 128;
    m.experts = 5;
    m.separate_experts = separate;
    m.type = DType::kQ8_0;
    m.type_of = [](const std::string& name) {  // a mix, as real files have
      return name.find("attn") != std::string::npos ? DType::kF16 : DType::kQ8_0;
    };
    const auto c = Write(m);
    for (int tp = 1; tp <= 4; ++tp) CheckRequest(*c, {.tp = tp});
  }
}

// Rows so long that each rank reads its slices one by one, not the rows whole.
TEST_F(LoaderTest, SlicesOfLongRows) {
  TinyModel m;
  m.layers = 1;
  m.dim = 16;
  m.heads = m.kv_heads = 2;
  m.head_dim = 8;
  m.ffn = 65536;
  m.vocab = 16;
  m.type_of = [](const std::string& name) { return DType::kF16; };
  const auto c = Write(m);
  CheckRequest(*c, {.tp = 2});
}

TEST_F(LoaderTest, UnitsComeInExecutionOrder) {
  TinyModel m;
  m.architecture = "qwen3moe";
  m.experts = 2;
  m.tied = true;
  const auto c = Write(m);
  const auto config = ReadModelConfig(*c);
  const auto plan = MakeShardPlan(*config, *c, {});
  const auto layout = MakeWeightLayout(*c, *config, plan->ranks[0]);
  ASSERT_TRUE(layout.ok()) << layout.status();
  using Kind = WeightUnit::Kind;
  std::vector<Kind> kinds;
  for (const WeightUnit& u : layout->units) kinds.push_back(u.kind);
  EXPECT_EQ(kinds, (std::vector<Kind>{Kind::kEmbedding, Kind::kAttention, Kind::kRouter,
                                      Kind::kExpert, Kind::kExpert, Kind::kAttention, Kind::kRouter,
                                      Kind::kExpert, Kind::kExpert, Kind::kHead}));
  // Tied: the head is the embedding unit's rows, only the norm stands here.
  EXPECT_NE(layout->units.back().Find(Role::kOutputNorm), nullptr);
  EXPECT_EQ(layout->units.back().Find(Role::kHead), nullptr);
}

TEST_F(LoaderTest, FileThatWasCutIsDataLoss) {
  TinyModel m;
  const auto c = Write(m);
  const auto config = ReadModelConfig(*c);
  const auto plan = MakeShardPlan(*config, *c, {});
  const auto layout = MakeWeightLayout(*c, *config, plan->ranks[0]);
  ASSERT_TRUE(layout.ok()) << layout.status();
  ASSERT_EQ(truncate(path_.c_str(), 100000), 0);
  std::vector<uint8_t> out(layout->bytes);
  for (const int threads : {1, 3}) {
    EXPECT_EQ(LoadAll(*c, *layout, threads, out.data(), nullptr).code(),
              absl::StatusCode::kDataLoss);
  }
}

}  // namespace
}  // namespace shoal
