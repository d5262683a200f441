// Shard directories: what is written is what the loader would make, whatever happens on the way.
#include "shard/shard_file.h"

#include <errno.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/buffer.h"
#include "tests/shard/gguf_writer.h"
#include "tests/shard/temp_dir.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;

class ShardFileTest : public testing::Test {
 protected:
  void SetUp() override { Open(TinyModel{}); }
  void Open(const TinyModel& model) {
    TinyModelGguf(model).WriteTo(temp_.File("model.gguf"));
    checkpoint_ = *OpenCheckpoint(temp_.File("model.gguf"));
    config_ = *ReadModelConfig(*checkpoint_);
  }
  std::string dir() const { return temp_.File("shards"); }
  absl::StatusOr<ShardWriteResult> Write() {
    return WriteShards(*checkpoint_, config_, dir(), options_);
  }
  WeightLayout Layout(int tp, int pp, int rank) {
    ShardPlan plan = *MakeShardPlan(config_, *checkpoint_, {tp, pp, {}});
    return *MakeWeightLayout(*checkpoint_, config_, plan.ranks[rank]);
  }
  // The rank's file holds the bytes that LoadUnit makes.
  void ExpectSameAsLoader(const ShardDirectory& d, int tp, int pp) {
    for (int r = 0; r < tp * pp; ++r) {
      const WeightLayout layout = Layout(tp, pp, r);
      ASSERT_EQ(*d.FindRank(layout), r);
      std::ifstream file(d.RankPath(r), std::ios::binary);
      for (const WeightUnit& u : layout.units) {
        std::vector<uint8_t> want(u.bytes), got(u.bytes);
        ASSERT_TRUE(LoadUnit(*checkpoint_, u, want.data()).ok());
        file.seekg(kShardDataOffset + u.offset);
        file.read(reinterpret_cast<char*>(got.data()), u.bytes);
        for (const WeightExtent& e : u.extents) {
          ASSERT_EQ(memcmp(&want[e.offset], &got[e.offset], e.bytes), 0) << e.tensor;
        }
      }
    }
  }

  TempDir temp_;
  std::unique_ptr<Checkpoint> checkpoint_;
  ModelConfig config_;
  ShardWriteOptions options_;
};

TEST_F(ShardFileTest, HoldsWhatTheLoaderMakesForEveryRank) {
  TinyModel model;
  model.type = DType::kQ4_K;
  model.rope_factors = true;
  Open(model);
  options_.shard = {2, 2, {}};
  options_.threads = 2;
  const auto result = Write();
  ASSERT_TRUE(result.ok()) << result.status();
  auto d = ShardDirectory::Open(dir());
  ASSERT_TRUE(d.ok()) << d.status();
  ExpectSameAsLoader(**d, 2, 2);
  EXPECT_TRUE((*d)->Verify(nullptr).ok());
}

TEST_F(ShardFileTest, OpensInPlaceOfTheGguf) {
  TinyModel model;
  model.rope_factors = true;
  Open(model);
  ASSERT_TRUE(Write().ok());
  const auto d = OpenCheckpoint(dir());
  ASSERT_TRUE(d.ok()) << d.status();
  const auto config = ReadModelConfig(**d);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->rope_factors, config_.rope_factors);
  EXPECT_EQ(config->vocab, config_.vocab);
  for (const std::string& key : checkpoint_->MetadataKeys()) {
    const MetadataValue* there = (*d)->FindMetadata(key);
    ASSERT_NE(there, nullptr) << key;
    EXPECT_EQ(*there, *checkpoint_->FindMetadata(key)) << key;
  }
  // A command that needs the plain weights says so.
  const TensorInfo* t = (*d)->FindTensor("blk.0.attn_q.weight");
  ASSERT_NE(t, nullptr);
  uint8_t byte;
  EXPECT_THAT(std::string((*d)->Read(*t, 0, 1, &byte).message()), HasSubstr("needs the GGUF"));
}

TEST_F(ShardFileTest, OtherPlanIsRefusedWithTheOneThatFits) {
  options_.shard = {2, 1, {}};
  ASSERT_TRUE(Write().ok());
  const auto rank = (*ShardDirectory::Open(dir()))->FindRank(Layout(1, 1, 0));
  EXPECT_EQ(rank.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(rank.status().message()), HasSubstr("--tp 2 --pp 1"));
}

TEST_F(ShardFileTest, StagesMayHaveTheLayersThatOneSays) {
  TinyModel model;
  model.layers = 4;
  Open(model);
  options_.shard = {1, 2, {}, {3, 1}};
  ASSERT_TRUE(Write().ok());
  const auto d = *ShardDirectory::Open(dir());
  for (int r = 0; r < 2; ++r) {
    const ShardPlan plan = *MakeShardPlan(config_, *checkpoint_, options_.shard);
    EXPECT_EQ(*d->FindRank(*MakeWeightLayout(*checkpoint_, config_, plan.ranks[r])), r);
  }
  const auto balanced = d->FindRank(Layout(1, 2, 0));
  EXPECT_THAT(std::string(balanced.status().message()), HasSubstr("--pp 2 --pp-layers 3,1;"));
}

TEST_F(ShardFileTest, SecondRunFindsItThere) {
  EXPECT_FALSE(Write()->already_there);
  EXPECT_TRUE(Write()->already_there);
  options_.shard = {2, 1, {}};
  EXPECT_THAT(std::string(Write().status().message()), HasSubstr("--force"));
  options_.force = true;
  ASSERT_TRUE(Write().ok());
  ExpectSameAsLoader(**ShardDirectory::Open(dir()), 2, 1);
}

// kill -9 at every unit: nothing looks whole, and the next run goes on.
TEST_F(ShardFileTest, KilledRunLeavesNothingWholeAndResumes) {
  const int64_t bytes = Layout(1, 1, 0).bytes;
  for (int64_t stop = 1; stop < bytes; stop += bytes / 5) {
    const pid_t child = fork();
    if (child == 0) {
      options_.progress = [stop](int64_t done, int64_t) {
        if (done >= stop) raise(SIGKILL);
      };
      (void)Write();
      _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status));
    ASSERT_EQ(WTERMSIG(status), SIGKILL);
    EXPECT_EQ(ShardDirectory::Open(dir()).status().code(), absl::StatusCode::kNotFound);
  }
  const auto result = Write();
  ASSERT_TRUE(result.ok()) << result.status();
  ExpectSameAsLoader(**ShardDirectory::Open(dir()), 1, 1);
  EXPECT_TRUE((*ShardDirectory::Open(dir()))->Verify(nullptr).ok());
}

TEST_F(ShardFileTest, ErrorOfTheDiskKeepsWhatWasWritten) {
  const WeightLayout layout = Layout(1, 2, 1);
  options_.shard = {1, 2, {}};
  auto writes = std::make_shared<std::atomic<int>>(0);
  const int first_rank = static_cast<int>(Layout(1, 2, 0).units.size());
  options_.file.fault = [writes, first_rank](const IoPiece&) {
    return ++*writes > first_rank + 2 ? ENOSPC : 0;  // each rank also writes a header
  };
  const auto failed = Write();
  EXPECT_EQ(failed.status().code(), absl::StatusCode::kResourceExhausted) << failed.status();
  options_.file.fault = nullptr;
  const auto result = Write();
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_GE(result->resumed_bytes, Layout(1, 2, 0).bytes);
  ExpectSameAsLoader(**ShardDirectory::Open(dir()), 1, 2);
}

TEST_F(ShardFileTest, ResumeOfAnotherModelStartsOver) {
  options_.file.fault = [](const IoPiece& p) { return p.offset > 500000 ? EIO : 0; };
  EXPECT_FALSE(Write().ok());
  TinyModel other;
  other.seed = 7;
  Open(other);
  options_.file.fault = nullptr;
  ASSERT_TRUE(Write().ok());
  ExpectSameAsLoader(**ShardDirectory::Open(dir()), 1, 1);
}

TEST_F(ShardFileTest, FlippedByteNamesTheTensor) {
  ASSERT_TRUE(Write().ok());
  const WeightLayout layout = Layout(1, 1, 0);
  const WeightUnit& unit = layout.units[2];
  const WeightExtent& extent = unit.extents[1];
  const auto d = ShardDirectory::Open(dir());
  FlipBit((*d)->RankPath(0), kShardDataOffset + unit.offset + extent.offset + 17);
  const absl::Status s = (*d)->Verify(nullptr);
  EXPECT_EQ(s.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(s.message()),
              AllOf(HasSubstr(extent.tensor), HasSubstr("rank-000.shard")));
}

TEST_F(ShardFileTest, DamagedDirectoriesAreRefused) {
  ASSERT_TRUE(Write().ok());
  const WeightLayout layout = Layout(1, 1, 0);
  const std::string file = dir() + "/rank-000.shard", manifest = dir() + "/manifest.json";
  const auto message = [&] {
    const auto d = ShardDirectory::Open(dir());
    if (!d.ok()) return std::string(d.status().message());
    return std::string((*d)->FindRank(layout).status().message());
  };
  EXPECT_EQ(message(), "");
  const auto size = fs::file_size(file);
  fs::resize_file(file, size - 4096);
  EXPECT_THAT(message(), AllOf(HasSubstr("rank-000.shard"), HasSubstr("was cut")));
  fs::resize_file(file, size);
  FlipBit(file, 12);
  EXPECT_THAT(message(), HasSubstr("header is damaged"));
  FlipBit(file, 12);
  FlipBit(dir() + "/model.gguf", 40);
  EXPECT_THAT(message(), HasSubstr("model.gguf is not the one"));
  FlipBit(dir() + "/model.gguf", 40);

  std::ifstream in(manifest);
  const std::string text((std::istreambuf_iterator<char>(in)), {});
  std::ofstream(manifest) << text.substr(0, text.size() / 2);
  EXPECT_THAT(message(), HasSubstr("is not JSON"));
  const size_t version = text.find("\"version\": 1") + strlen("\"version\": ");
  const std::string other = absl::StrCat(text.substr(0, version), 9, text.substr(version + 1));
  std::ofstream(manifest) << other;
  EXPECT_THAT(message(), HasSubstr("format version 9, this program reads version 1"));
  // Another model's manifest: same shapes, other weights.
  std::ofstream(manifest) << text;
  const std::string keep = temp_.File("keep");
  fs::rename(dir(), keep);
  TinyModel model;
  model.seed = 5;
  Open(model);
  ASSERT_TRUE(Write().ok());
  fs::copy_file(keep + "/manifest.json", manifest, fs::copy_options::overwrite_existing);
  fs::copy_file(keep + "/model.gguf", dir() + "/model.gguf", fs::copy_options::overwrite_existing);
  EXPECT_THAT(message(), HasSubstr("belongs to another model"));
  fs::remove(manifest);
  EXPECT_THAT(message(), HasSubstr("no manifest.json"));
}

TEST_F(ShardFileTest, EveryTruncatedManifestIsAnError) {
  ASSERT_TRUE(Write().ok());
  std::ifstream in(dir() + "/manifest.json");
  const std::string text((std::istreambuf_iterator<char>(in)), {});
  ASSERT_TRUE(ManifestFromJson(text, "m").ok());
  for (size_t n = 0; n + 2 < text.size(); n += 97) {
    EXPECT_FALSE(ManifestFromJson(text.substr(0, n), "m").ok());
  }
  for (const char* odd : {"[]", "1", "{}", "{\"version\":1}", "null", "\"x\""}) {
    EXPECT_FALSE(ManifestFromJson(odd, "m").ok()) << odd;
  }
}

// The format as shard/README.md states it: a change must raise the version.
TEST_F(ShardFileTest, GoldenHeader) {
  ASSERT_TRUE(Write().ok());
  std::ifstream f(dir() + "/rank-000.shard", std::ios::binary);
  std::vector<uint8_t> b(kShardDataOffset);
  f.read(reinterpret_cast<char*>(b.data()), kShardDataOffset);
  const uint8_t begin[] = {'S', 'H', 'O', 'A', 'L', 'S', 'H', 'D', 1, 0, 0, 0,
                           0,   0,   0,   0,   1,   0,   0,   0,   0, 0, 0, 0};
  EXPECT_EQ(memcmp(b.data(), begin, sizeof begin), 0);
  const auto d = ShardDirectory::Open(dir());
  uint64_t fingerprint, bytes, checksum;
  memcpy(&fingerprint, &b[24], 8);
  memcpy(&bytes, &b[32], 8);
  memcpy(&checksum, &b[40], 8);
  EXPECT_EQ(fingerprint, (*d)->manifest().fingerprint);
  EXPECT_EQ(bytes, static_cast<uint64_t>(Layout(1, 1, 0).bytes));
  EXPECT_EQ(checksum, Checksum(b.data(), 40));
  for (size_t i = sizeof(ShardHeader); i < b.size(); ++i) ASSERT_EQ(b[i], 0);
}

TEST_F(ShardFileTest, ExpertsHaveUnitsOfTheirOwn) {
  TinyModel model;
  model.experts = 4;
  Open(model);
  ASSERT_TRUE(Write().ok());
  ExpectSameAsLoader(**ShardDirectory::Open(dir()), 1, 1);
}

}  // namespace
}  // namespace shoal
