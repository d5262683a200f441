// The disk cache of packed weights: packed once, and never a wrong byte whatever lies in the
// folder.
#include "shard/shard_cache.h"

#include <errno.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utime.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/buffer.h"
#include "offload/folder_lock.h"
#include "shard/weight_store.h"
#include "tests/shard/gguf_writer.h"
#include "tests/shard/temp_dir.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using ::testing::SizeIs;

class ShardCacheTest : public testing::Test {
 protected:
  void SetUp() override {
    TinyModelGguf(TinyModel{}).WriteTo(temp_.File("model.gguf"));
    OpenModel();
    options_.dir = temp_.File("cache");
    options_.write.progress = [this](int64_t, int64_t) { ++packed_; };
  }
  void OpenModel() {
    checkpoint_ = *OpenCheckpoint(temp_.File("model.gguf"));
    config_ = *ReadModelConfig(*checkpoint_);
  }
  absl::StatusOr<CachedShards> Open(bool anew = false) {
    return OpenShardCache(*checkpoint_, config_, options_, anew);
  }
  // Whether this call had to pack.
  bool Packs(bool anew = false) {
    packed_ = 0;
    const auto d = Open(anew);
    EXPECT_TRUE(d.ok()) << d.status();
    EXPECT_TRUE(d.ok() && d->directory->Verify(nullptr).ok());
    return packed_ > 0;
  }
  std::vector<std::string> Entries() const {
    std::vector<std::string> names;
    if (!fs::exists(options_.dir)) return names;
    for (const auto& e : fs::directory_iterator(options_.dir)) names.push_back(e.path());
    return names;
  }
  // Names of what takes room in the cache.
  std::vector<std::string> Files() const {
    std::vector<std::string> names;
    for (const auto& e : fs::recursive_directory_iterator(options_.dir)) {
      if (e.is_regular_file() && e.file_size() > 0) names.push_back(e.path());
    }
    return names;
  }

  TempDir temp_;
  std::unique_ptr<Checkpoint> checkpoint_;
  ModelConfig config_;
  ShardCacheOptions options_;
  std::atomic<int> packed_{0};
};

TEST_F(ShardCacheTest, PacksOnceForEachModelAndPlan) {
  EXPECT_TRUE(Packs());
  EXPECT_FALSE(Packs());
  options_.write.shard.tp = 2;
  EXPECT_TRUE(Packs());
  options_.write.shard.tp = 1;
  EXPECT_FALSE(Packs());
  EXPECT_THAT(Entries(), SizeIs(2));
  EXPECT_TRUE(Packs(/*anew=*/true));
  // Written since: the same name, perhaps other weights.
  const utimbuf then = {1000000000, 1000000000};
  ASSERT_EQ(utime(temp_.File("model.gguf").c_str(), &then), 0);
  OpenModel();
  EXPECT_TRUE(Packs());
  EXPECT_THAT(Entries(), SizeIs(3));
}

TEST_F(ShardCacheTest, ADamagedManifestIsPackedAnew) {
  EXPECT_TRUE(Packs());
  FlipBit(Entries()[0] + "/manifest.json", 3);
  EXPECT_TRUE(Packs());
  fs::resize_file(Entries()[0] + "/model.gguf", 20);
  EXPECT_TRUE(Packs());
  fs::remove(Entries()[0] + "/manifest.json");
  EXPECT_TRUE(Packs());
  EXPECT_FALSE(Packs());
}

TEST_F(ShardCacheTest, ThreadsAndProcessesTakeTurns) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([this] {
      ShardCacheOptions mine = options_;
      std::atomic<int> calls{0};
      mine.write.progress = [&calls, this](int64_t, int64_t) {
        if (calls++ == 0) ++packed_;
      };
      const auto d = OpenShardCache(*checkpoint_, config_, mine, false);
      EXPECT_TRUE(d.ok()) << d.status();
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(packed_, 1);
  EXPECT_FALSE(Packs());
}

TEST_F(ShardCacheTest, WhatDoesNotFitLeavesNothingBehind) {
  options_.write.file.fault = [](const IoPiece& piece) { return piece.write ? ENOSPC : 0; };
  EXPECT_EQ(Open().status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(Files(), SizeIs(0));
  // Whoever waits for the lock has this file open; one that comes later must find the same.
  EXPECT_TRUE(fs::exists(Entries()[0] + "/" + FolderLock::kFile));
  options_.write.file.fault = nullptr;
  options_.memory = 1000;
  const absl::Status small = Open().status();
  EXPECT_EQ(small.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(small.message()), HasSubstr("of memory"));
  EXPECT_THAT(Files(), SizeIs(0));
  options_.memory = 0;
  EXPECT_TRUE(Packs());
}

// Three plans of a model are three entries; two of them fit.
class ShardCacheLimitTest : public ShardCacheTest {
 protected:
  void SetUp() override {
    ShardCacheTest::SetUp();
    ASSERT_TRUE(PacksFor(1));
    one_ = Entries()[0];
    ASSERT_TRUE(PacksFor(2));
    for (const std::string& e : Entries()) two_ = e != one_ ? e : two_;
    UsedAt(one_, 1000);
    UsedAt(two_, 2000);
    options_.bytes_max = Taken() * 5 / 4;
  }
  bool PacksFor(int tp) {
    options_.write.shard.tp = tp;
    return Packs();
  }
  static void UsedAt(const std::string& entry, int seconds) {
    const utimbuf then = {seconds, seconds};
    ASSERT_EQ(utime((entry + "/" + FolderLock::kUseFile).c_str(), &then), 0);
  }
  int64_t Taken() const {
    int64_t bytes = 0;
    for (const std::string& f : Files()) bytes += static_cast<int64_t>(fs::file_size(f));
    return bytes;
  }
  static bool IsWhole(const std::string& entry) { return ShardDirectory::Open(entry).ok(); }
  absl::Status PackThird() {
    options_.write.shard.tp = 1;
    options_.write.shard.pp = 2;
    return Open().status();
  }

  std::string one_, two_;
};

TEST_F(ShardCacheLimitTest, WhatWasUsedLongestAgoGivesWay) {
  EXPECT_TRUE(PackThird().ok());
  EXPECT_FALSE(IsWhole(one_));
  EXPECT_TRUE(IsWhole(two_));
  EXPECT_LE(Taken(), options_.bytes_max);
  options_.write.shard.pp = 1;
  EXPECT_TRUE(PacksFor(1));  // the second one had been used before the third
  EXPECT_FALSE(IsWhole(two_));
  EXPECT_THAT(Entries(), SizeIs(4));  // three, and the lock of the folder
}

TEST_F(ShardCacheLimitTest, UsingAnEntryCounts) {
  EXPECT_FALSE(PacksFor(1));
  EXPECT_TRUE(PackThird().ok());
  EXPECT_TRUE(IsWhole(one_));
  EXPECT_FALSE(IsWhole(two_));
}

TEST_F(ShardCacheLimitTest, WhatAnotherProcessUsesStays) {
  int ready[2], done[2];
  ASSERT_EQ(pipe(ready), 0);
  ASSERT_EQ(pipe(done), 0);
  const pid_t other = fork();
  if (other == 0) {
    close(done[1]);
    const auto in_use = FolderLock::Use(one_);
    char byte = 0;
    (void)!write(ready[1], &byte, 1);
    (void)!read(done[0], &byte, 1);  // until the test ends it
    _exit(in_use.ok() ? 0 : 1);
  }
  char byte = 0;
  ASSERT_EQ(read(ready[0], &byte, 1), 1);
  UsedAt(one_, 1000);
  EXPECT_TRUE(PackThird().ok());
  EXPECT_TRUE(IsWhole(one_));
  EXPECT_FALSE(IsWhole(two_));
  // Both that are there now are in use: no room for another, and nobody loses anything.
  const auto mine = Open();
  ASSERT_TRUE(mine.ok());
  options_.write.shard.pp = 1;
  options_.write.shard.tp = 2;
  const absl::Status refused = Open().status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.message()),
              AllOf(HasSubstr("--disk-cache-limit"), HasSubstr("used by running processes")));
  EXPECT_TRUE(IsWhole(one_));
  EXPECT_TRUE(mine->directory->Verify(nullptr).ok());
  close(done[1]);
  int status = 1;
  ASSERT_EQ(waitpid(other, &status, 0), other);
  EXPECT_EQ(status, 0);
  EXPECT_TRUE(PacksFor(2));
  EXPECT_FALSE(IsWhole(one_));
  for (const int fd : {ready[0], ready[1], done[0]}) close(fd);
}

TEST_F(ShardCacheLimitTest, AModelLargerThanTheLimitIsRefusedAndNothingGivesWay) {
  options_.bytes_max = 10'000;
  const absl::Status refused = PackThird();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("may take 9.77 KiB (--disk-cache-limit)"));
  EXPECT_TRUE(IsWhole(one_));
  EXPECT_TRUE(IsWhole(two_));
  // What is there already is used all the same.
  options_.write.shard.pp = 1;
  EXPECT_FALSE(PacksFor(2));
}

TEST_F(ShardCacheLimitTest, WhatElseLiesInTheFolderIsLeftAlone) {
  const std::string mine = options_.dir + "/mine";
  fs::create_directory(mine);
  std::ofstream(mine + "/file") << std::string(options_.bytes_max, 'x');
  EXPECT_TRUE(PackThird().ok());
  EXPECT_TRUE(fs::exists(mine + "/file"));
}

// Each unit of the file is damaged in turn; all of them stream. What comes out is what the GGUF
// holds, also the second time a unit passes, when nothing compares it.
TEST_F(ShardCacheTest, ADamagedUnitIsMendedFromTheSource) {
  const auto d = Open();
  ASSERT_TRUE(d.ok());
  const WeightLayout& layout = d->directory->manifest().ranks[0].layout;
  const Placement placement =
      *PlaceWeights(layout, config_, LeastWeightBytes(layout, config_, 4), 4);
  ASSERT_TRUE(placement.streams());
  int mended = 0;
  for (size_t i = 0; i < layout.units.size(); ++i) {
    if (layout.units[i].kind == WeightUnit::Kind::kEmbedding) continue;
    const WeightExtent& e = layout.units[i].extents.back();
    FlipBit(d->directory->RankPath(0),
            kShardDataOffset + layout.units[i].offset + e.offset + e.bytes / 2);
    WeightStoreOptions options;
    std::vector<std::string> warnings;
    options.source = checkpoint_.get();
    options.warn = [&warnings](const std::string& w) { warnings.push_back(w); };
    const auto store = OpenWeights(*d->directory, layout, placement, options);
    ASSERT_TRUE(store.ok()) << store.status();
    for (int pass = 0; pass < 2; ++pass) {
      for (size_t u = 0; u < layout.units.size(); ++u) {
        if (layout.units[u].kind == WeightUnit::Kind::kEmbedding) continue;
        const auto got = store->source->Acquire(static_cast<int>(u));
        ASSERT_TRUE(got.ok()) << got.status();
        EXPECT_TRUE(d->directory->CheckUnit(0, static_cast<int>(u), *got).ok())
            << u << " in pass " << pass;
        store->source->Release(static_cast<int>(u));
      }
    }
    EXPECT_THAT(warnings, SizeIs(1)) << i;
    mended += static_cast<int>(warnings.size());
  }
  EXPECT_GT(mended, 3);
  EXPECT_TRUE(d->directory->Verify(nullptr).ok());
}

}  // namespace
}  // namespace shoal
