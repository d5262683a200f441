// The files of a folder stay below its limit, and what gives way is the oldest of what nobody uses.
#include "offload/kv_directory.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "offload/kv_pager.h"

namespace shoal {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class NoMemory final : public KvMemory {
 public:
  void CopyOut(int /*layer*/, absl::Span<const int32_t> blocks, uint8_t* to) override {
    memset(to, 0x5a, blocks.size() * kBlockBytes);
  }
  absl::Status CopyIn(int, absl::Span<const int32_t>, const uint8_t*) override {
    return absl::OkStatus();
  }
  static constexpr int64_t kBlockBytes = 1024;
};

class KvDirectoryTest : public testing::Test {
 protected:
  KvDirectoryTest() : dir_(testing::TempDir() + "/kv_directory_" + std::to_string(getpid())) {
    std::filesystem::remove_all(dir_);
    std::filesystem::create_directories(dir_);
  }
  ~KvDirectoryTest() override { std::filesystem::remove_all(dir_); }

  KvPager::Options Options(uint64_t key, int64_t limit = 0) {
    KvPager::Options o;
    o.file.dir = dir_;
    o.file.keep = true;
    o.file.key = {key, key};
    o.file.shape = kShape;
    o.file.records = 16;
    o.file.dir_bytes_max = limit;
    o.buffers = 4;
    o.warn = [this](const std::string& w) { warning_ = w; };
    return o;
  }
  std::unique_ptr<KvPager> Open(const KvPager::Options& o) {
    auto pager = KvPager::Open(o, memory_);
    EXPECT_TRUE(pager.ok()) << pager.status();
    return pager.ok() ? *std::move(pager) : nullptr;
  }
  static void Write(KvPager& pager, int record) {
    const std::vector<int32_t> blocks(kKvPageBlocks, 0);
    const std::vector<KvName> names(kKvPageBlocks, KvName{1, static_cast<uint64_t>(record)});
    pager.Write(record, names, blocks);
  }
  // Pages in `records`, written in that order, by a process that has ended.
  void Fill(uint64_t key, const std::vector<int>& records) {
    auto pager = Open(Options(key));
    for (const int r : records) Write(*pager, r);
  }
  std::vector<int> Pages(uint64_t key) {
    std::vector<int> pages;
    auto pager = Open(Options(key));
    for (size_t r = 0; r < pager->found().size(); r++) {
      if (pager->found()[r].blocks() > 0) pages.push_back(static_cast<int>(r));
    }
    return pages;
  }
  std::string PathOf(uint64_t key) const {
    char name[64];
    snprintf(name, sizeof name, "/kv-%016llx%016llx.pages", static_cast<unsigned long long>(key),
             static_cast<unsigned long long>(key));
    return dir_ + name;
  }
  void UsedAt(uint64_t key, int seconds) {
    const timespec times[2] = {{seconds, 0}, {seconds, 0}};
    ASSERT_EQ(utimensat(AT_FDCWD, PathOf(key).c_str(), times, 0), 0);
  }
  int64_t Taken() const {
    int64_t bytes = 0;
    for (const auto& e : std::filesystem::directory_iterator(dir_)) {
      struct stat st = {};
      if (stat(e.path().c_str(), &st) == 0)
        bytes += std::min<int64_t>(int64_t{st.st_blocks} * 512, st.st_size);
    }
    return bytes;
  }
  // Asks for the room of `pages` pages where `limit` bytes may be taken.
  absl::Status Grow(int64_t limit, int pages) {
    grown_ = false;
    return KvDirectory(dir_, limit).Grow(pages * kShape.record_bytes(), [this] {
      grown_ = true;
      return absl::OkStatus();
    });
  }

  // What a file system keeps about a file with holes; less than a page.
  static constexpr int64_t kSlack = 16 << 10;
  static constexpr KvPageShape kShape = {2, NoMemory::kBlockBytes};
  const std::string dir_;
  NoMemory memory_;
  std::string warning_;
  bool grown_ = false;
};

TEST_F(KvDirectoryTest, WithoutALimitNothingGivesWay) {
  Fill(1, {0, 1, 2});
  EXPECT_TRUE(Grow(0, 1000).ok());
  EXPECT_TRUE(grown_);
  EXPECT_THAT(Pages(1), ElementsAre(0, 1, 2));
}

TEST_F(KvDirectoryTest, TheOldestPagesOfTheFileUsedLongestAgoGiveWay) {
  Fill(1, {2, 0, 1, 3});
  Fill(2, {0, 1});
  UsedAt(1, 1000);
  UsedAt(2, 2000);
  const int64_t full = Taken();
  EXPECT_TRUE(Grow(full, 2).ok());
  EXPECT_TRUE(grown_);
  EXPECT_LE(Taken(), full - 2 * kShape.record_bytes() + kSlack);
  EXPECT_THAT(Pages(2), ElementsAre(0, 1));
  EXPECT_THAT(Pages(1), ElementsAre(1, 3));
}

TEST_F(KvDirectoryTest, FilesInUseKeepWhatTheyHave) {
  Fill(1, {0, 1});
  Fill(2, {0, 1, 2});
  UsedAt(2, 2000);
  UsedAt(1, 1000);
  const int64_t full = Taken();
  const auto user = Open(Options(1));
  const absl::Status s = Grow(full, 4);
  EXPECT_EQ(s.code(), absl::StatusCode::kResourceExhausted) << s;
  EXPECT_THAT(std::string(s.message()), HasSubstr("--kv-cache-limit"));
  EXPECT_FALSE(grown_);
  EXPECT_EQ(user->found().size(), 2U);
  EXPECT_TRUE(Grow(full, 3).ok());  // the other file's
}

TEST_F(KvDirectoryTest, AFileThatHoldsNoPagesIsEmptied) {
  std::ofstream(PathOf(1)) << std::string(100'000, 'x');
  UsedAt(1, 1000);
  Fill(2, {0});
  EXPECT_TRUE(Grow(Taken(), 1).ok());
  EXPECT_EQ(std::filesystem::file_size(PathOf(1)), 0U);
  EXPECT_THAT(Pages(2), ElementsAre(0));
}

TEST_F(KvDirectoryTest, APagerMakesRoomForWhatItWrites) {
  Fill(1, {0, 1, 2, 3, 4, 5});
  const int64_t limit = Taken() + kKvFileHeaderBytes + kSlack;
  {
    auto pager = Open(Options(2, limit));
    for (int r = 0; r < 4; r++) Write(*pager, r);
    pager->Flush();
    EXPECT_EQ(pager->stats().pages_out, 4);
    EXPECT_LE(Taken(), limit);
  }
  EXPECT_EQ(warning_, "");
  EXPECT_THAT(Pages(2), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(Pages(1), ElementsAre(4, 5));
  // A record that gave way takes its place on the disk again, and others pay for it.
  {
    auto pager = Open(Options(1, limit));
    Write(*pager, 0);
    pager->Flush();
    EXPECT_LE(Taken(), limit);
  }
  EXPECT_THAT(Pages(1), ElementsAre(0, 4, 5));
  EXPECT_THAT(Pages(2), ElementsAre(1, 2, 3));
}

TEST_F(KvDirectoryTest, WhatFindsNoRoomIsLostAndSaid) {
  Fill(1, {0, 1});
  const int64_t limit = Taken() + kShape.record_bytes() + kKvFileHeaderBytes;
  const auto user = Open(Options(1));
  auto pager = Open(Options(2, limit));
  Write(*pager, 0);
  Write(*pager, 1);
  pager->Flush();
  EXPECT_EQ(pager->stats().pages_out, 1);
  EXPECT_EQ(pager->stats().failed, 1);
  EXPECT_THAT(warning_, HasSubstr("computed again when needed"));
  EXPECT_LE(Taken(), limit);
}

}  // namespace
}  // namespace shoal
