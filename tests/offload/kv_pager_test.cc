// Pages come back as they were written or not at all, whatever happens to the file in between.
#include "offload/kv_pager.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace shoal {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Blocks [block][layer][block_bytes] in RAM.
class Blocks final : public KvMemory {
 public:
  Blocks(int blocks, const KvPageShape& shape)
      : shape_(shape), data_(blocks * shape.layers * shape.block_bytes) {}
  uint8_t* at(int block, int layer) {
    return &data_[(int64_t{block} * shape_.layers + layer) * shape_.block_bytes];
  }
  void CopyOut(int layer, absl::Span<const int32_t> blocks, uint8_t* to) override {
    for (size_t i = 0; i < blocks.size(); i++) {
      memcpy(to + i * shape_.block_bytes, at(blocks[i], layer), shape_.block_bytes);
    }
  }
  absl::Status CopyIn(int layer, absl::Span<const int32_t> blocks, const uint8_t* from) override {
    for (size_t i = 0; i < blocks.size(); i++) {
      if (blocks[i] < 0) continue;
      memcpy(at(blocks[i], layer), from + i * shape_.block_bytes, shape_.block_bytes);
    }
    return absl::OkStatus();
  }
  // Content that says what and where it is.
  void Fill(absl::Span<const int32_t> blocks, uint64_t page) {
    for (size_t i = 0; i < blocks.size(); i++) {
      for (int l = 0; l < shape_.layers; l++) Words(page, i, l, at(blocks[i], l));
    }
  }
  bool Holds(absl::Span<const int32_t> blocks, uint64_t page) {
    std::vector<uint8_t> wanted(shape_.block_bytes);
    for (size_t i = 0; i < blocks.size(); i++) {
      for (int l = 0; l < shape_.layers; l++) {
        Words(page, i, l, wanted.data());
        if (memcmp(wanted.data(), at(blocks[i], l), wanted.size()) != 0) return false;
      }
    }
    return true;
  }
  void Words(uint64_t page, uint64_t block, uint64_t layer, uint8_t* out) const {
    for (int64_t w = 0; w < shape_.block_bytes / 8; w++) {
      const uint64_t word = page << 40 | block << 32 | layer << 24 | static_cast<uint64_t>(w);
      memcpy(out + 8 * w, &word, 8);
    }
  }

 private:
  KvPageShape shape_;
  std::vector<uint8_t> data_;
};

std::vector<int32_t> Range(int first, int n) {
  std::vector<int32_t> r(n);
  std::iota(r.begin(), r.end(), first);
  return r;
}

class KvPagerTest : public testing::TestWithParam<IoEngine> {
 protected:
  KvPagerTest() {
    dir_ = testing::TempDir() + "/kv_pager_" + std::to_string(getpid());
    std::filesystem::remove_all(dir_);
    options_.file.dir = dir_;
    options_.file.keep = true;
    options_.file.key = {7, 9};
    options_.file.shape = {3, 1088};  // parts of 17408 bytes are no multiple of 4096
    options_.file.records = 12;
    options_.file.engine = GetParam();
    options_.buffers = 6;
    options_.warn = [this](const std::string& w) {
      warnings_++;
      warning_ = w;
    };
    memory_ = std::make_unique<Blocks>(64, options_.file.shape);
  }
  ~KvPagerTest() override { std::filesystem::remove_all(dir_); }

  std::unique_ptr<KvPager> Open() {
    auto pager = KvPager::Open(options_, *memory_);
    EXPECT_TRUE(pager.ok()) << pager.status();
    return pager.ok() ? *std::move(pager) : nullptr;
  }
  std::string PathOf() const {
    for (const auto& e : std::filesystem::directory_iterator(dir_)) {
      if (e.path().extension() == ".pages") return e.path();
    }
    return "";
  }
  static std::vector<KvName> Names(int record, int blocks) {
    std::vector<KvName> names;
    for (int i = 0; i < blocks; i++) names.push_back({uint64_t(record), uint64_t(i)});
    return names;
  }
  void Write(KvPager& p, int record, int blocks = kKvPageBlocks) {
    const auto ids = Range(0, blocks);
    memory_->Fill(ids, 100 + record);
    p.Write(record, Names(record, blocks), ids);
    memory_->Fill(ids, 999);  // written behind: the blocks are free at once
  }
  bool Reads(KvPager& p, int record, int blocks = kKvPageBlocks) {
    const auto ids = Range(32, blocks);
    memory_->Fill(ids, 998);
    p.Load(record, Names(record, blocks).back(), ids);
    const bool worked = p.FinishLoads()[0];
    EXPECT_TRUE(!worked || memory_->Holds(ids, 100 + record)) << "record " << record;
    return worked;
  }
  void Poke(int64_t offset, int64_t bytes = 1) {
    std::fstream f(PathOf(), std::ios::in | std::ios::out | std::ios::binary);
    for (int64_t i = 0; i < bytes; i++) {
      f.seekg(offset + i);
      const char c = static_cast<char>(f.get() ^ 0x20);
      f.seekp(offset + i);
      f.put(c);
    }
  }
  static int FoundPages(const KvPager& p) {
    return static_cast<int>(std::count_if(p.found().begin(), p.found().end(),
                                          [](const KvRecord& r) { return r.blocks() > 0; }));
  }

  std::string dir_;
  KvPager::Options options_;
  std::unique_ptr<Blocks> memory_;
  std::atomic<int> warnings_{0};
  std::string warning_;  // read when the pager is gone or its loads are done
};

TEST_P(KvPagerTest, PagesComeBack) {
  auto p = Open();
  for (int r = 0; r < 12; r++) Write(*p, r, 1 + r % kKvPageBlocks);
  for (int r = 11; r >= 0; r--) EXPECT_TRUE(Reads(*p, r, 1 + r % kKvPageBlocks));
  Write(*p, 3);  // another page in the place of the first
  EXPECT_TRUE(Reads(*p, 3));
  p->Flush();
  EXPECT_EQ(p->stats().pages_out, 13);
  EXPECT_EQ(p->stats().pages_in, 13);
  EXPECT_EQ(p->stats().failed, 0);
  EXPECT_EQ(warnings_, 0);
}

TEST_P(KvPagerTest, LoadsSkipBlocksThatAreThere) {
  auto p = Open();
  Write(*p, 0, 4);
  const std::vector<int32_t> some = {40, -1, 42, -1};
  memory_->Fill(Range(40, 4), 77);
  p->Load(0, Names(0, 4).back(), some);
  EXPECT_THAT(p->FinishLoads(), ElementsAre(true));
  std::vector<uint8_t> wanted(options_.file.shape.block_bytes);
  for (int i = 0; i < 4; i++) {
    memory_->Words(some[i] < 0 ? 77 : 100, i, 1, wanted.data());
    EXPECT_EQ(memcmp(wanted.data(), memory_->at(40 + i, 1), wanted.size()), 0) << i;
  }
}

TEST_P(KvPagerTest, ABeginningOfAPageIsReadToo) {
  auto p = Open();
  Write(*p, 0, 9);
  EXPECT_TRUE(Reads(*p, 0, 4));
  EXPECT_TRUE(Reads(*p, 0, 9));
  p->Load(0, Names(0, 9).back(), Range(32, 4));  // ends with another block
  p->Load(0, Names(0, 12).back(), Range(36, 12));
  EXPECT_THAT(p->FinishLoads(), ElementsAre(false, false));
}

TEST_P(KvPagerTest, StreamsPartsInOrder) {
  auto p = Open();
  for (int r = 0; r < 5; r++) Write(*p, r);
  const KvPageShape& shape = options_.file.shape;
  std::vector<KvPager::StreamPart> parts;
  for (int layer = 0; layer < shape.layers; layer++) {
    for (int r : {4, 0, 2, 1, 3}) parts.push_back({r, layer});
  }
  for (int pass = 0; pass < 3; pass++) {
    p->BeginStream(parts);
    const size_t until = pass == 1 ? 4 : parts.size();  // one pass stops early
    for (size_t i = 0; i < until; i++) {
      const uint8_t* part = p->NextPart();
      ASSERT_NE(part, nullptr);
      std::vector<uint8_t> wanted(shape.block_bytes);
      for (int b = 0; b < kKvPageBlocks; b++) {
        memory_->Words(100 + parts[i].record, b, parts[i].layer, wanted.data());
        ASSERT_EQ(memcmp(wanted.data(), part + b * shape.block_bytes, wanted.size()), 0);
      }
    }
    p->EndStream();
    EXPECT_TRUE(Reads(*p, 4));  // all buffers are back
  }
  EXPECT_TRUE(p->TakeFailedRecords().empty());
}

TEST_P(KvPagerTest, PagesSurviveARestart) {
  {
    auto p = Open();
    for (int r = 0; r < 4; r++) Write(*p, r, 16 - r);
  }
  auto p = Open();
  ASSERT_EQ(FoundPages(*p), 4);
  for (int r = 0; r < 4; r++) {
    EXPECT_EQ(p->found()[r].prefix, Names(r, 16 - r));
    EXPECT_EQ(p->found()[r].stamp, uint64_t(r) + 1);
    EXPECT_TRUE(Reads(*p, r, 16 - r));
  }
  EXPECT_EQ(warnings_, 0);
}

TEST_P(KvPagerTest, WithoutANameNothingStays) {
  options_.file.keep = false;
  {
    auto p = Open();
    Write(*p, 0);
    EXPECT_TRUE(Reads(*p, 0));
    EXPECT_TRUE(std::filesystem::is_empty(dir_));
  }
  EXPECT_EQ(FoundPages(*Open()), 0);
}

TEST_P(KvPagerTest, AFlippedByteLosesItsPageOnly) {
  const KvPageShape& shape = options_.file.shape;
  {
    auto p = Open();
    for (int r = 0; r < 4; r++) Write(*p, r);
  }
  Poke(shape.part_offset(1, 2) + 5 * shape.block_bytes + 3);  // data
  Poke(shape.record_offset(2) + 30);                          // header
  Poke(shape.record_offset(3) + sizeof(KvRecordHeader) + 9);  // a checksum
  auto p = Open();
  EXPECT_EQ(FoundPages(*p), 2);
  EXPECT_TRUE(Reads(*p, 0));
  EXPECT_FALSE(Reads(*p, 1));
  EXPECT_FALSE(Reads(*p, 2));
  p->BeginStream({{0, 0}, {1, 2}, {0, 2}});
  EXPECT_NE(p->NextPart(), nullptr);
  EXPECT_EQ(p->NextPart(), nullptr);
  EXPECT_NE(p->NextPart(), nullptr);
  p->EndStream();
  EXPECT_THAT(p->TakeFailedRecords(), ElementsAre(1));
  EXPECT_EQ(warnings_, 1);
  EXPECT_THAT(warning_, HasSubstr("record 1, layer 2, is damaged"));
  Write(*p, 1);  // a record is as good as new when it is written again
  EXPECT_TRUE(Reads(*p, 1));
}

TEST_P(KvPagerTest, ATornTailIsNoPage) {
  const KvPageShape& shape = options_.file.shape;
  {
    auto p = Open();
    for (int r = 0; r < 4; r++) Write(*p, r);
  }
  std::filesystem::resize_file(PathOf(), shape.part_offset(2, 1) + 100);
  auto p = Open();
  EXPECT_EQ(FoundPages(*p), 2);
  EXPECT_TRUE(Reads(*p, 0));
  EXPECT_TRUE(Reads(*p, 1));
  for (int r = 2; r < 12; r++) Write(*p, r);
  for (int r = 0; r < 12; r++) EXPECT_TRUE(Reads(*p, r));
}

// The header of one page over the parts of another, as a crash in the middle of a write leaves it.
TEST_P(KvPagerTest, AnOldHeaderOverNewPartsIsSeen) {
  {
    auto p = Open();
    Write(*p, 0);
  }
  const std::string path = PathOf();
  std::vector<char> old(options_.file.shape.header_bytes());
  std::fstream f(path, std::ios::in | std::ios::out | std::ios::binary);
  f.seekg(options_.file.shape.record_offset(0));
  f.read(old.data(), static_cast<int64_t>(old.size()));
  {
    auto p = Open();
    const auto ids = Range(0, kKvPageBlocks);
    memory_->Fill(ids, 55);
    p->Write(0, Names(77, kKvPageBlocks), ids);
  }
  f.seekp(options_.file.shape.record_offset(0));
  f.write(old.data(), static_cast<int64_t>(old.size()));
  f.close();
  auto p = Open();
  EXPECT_EQ(FoundPages(*p), 1);
  EXPECT_FALSE(Reads(*p, 0));
}

TEST_P(KvPagerTest, FilesOfOthersAreStartedAnew) {
  const auto write_one = [this] {
    auto p = Open();
    Write(*p, 0);
  };
  write_one();
  Poke(offsetof(KvFileHeader, version));
  EXPECT_EQ(FoundPages(*Open()), 0);
  EXPECT_THAT(warning_, HasSubstr("has format version"));
  write_one();
  Poke(offsetof(KvFileHeader, key));
  EXPECT_EQ(FoundPages(*Open()), 0);
  EXPECT_THAT(warning_, HasSubstr("another model's"));
  write_one();
  Poke(0, 8);
  EXPECT_EQ(FoundPages(*Open()), 0);
  EXPECT_THAT(warning_, HasSubstr("is not a file of KV pages"));
  EXPECT_EQ(warnings_, 3);
  write_one();
  // Another model's file under this one's name, whole: no record of it is taken for ours.
  const std::string path = PathOf();
  const std::string kept = path + ".kept";
  std::filesystem::rename(path, kept);
  options_.file.key = {8, 9};
  write_one();
  options_.file.key = {7, 9};
  for (const auto& e : std::filesystem::directory_iterator(dir_)) {
    if (e.path() != kept) std::filesystem::rename(e.path(), path);
  }
  EXPECT_EQ(FoundPages(*Open()), 0);
}

TEST_P(KvPagerTest, TwoProcessesDoNotShareAFile) {
  auto first = Open();
  Write(*first, 0);
  auto second = Open();
  EXPECT_THAT(warning_, HasSubstr("in use by another process"));
  memory_->Fill(Range(0, kKvPageBlocks), 3);
  second->Write(0, Names(77, kKvPageBlocks), Range(0, kKvPageBlocks));
  second->Flush();
  EXPECT_TRUE(Reads(*first, 0));
  first.reset();
  second.reset();
  EXPECT_EQ(FoundPages(*Open()), 1);
}

TEST_P(KvPagerTest, FailingTransfersLosePagesNotMore) {
  std::atomic<int> error{0};
  std::atomic<bool> writes{true};
  options_.file.fault = [&](const IoPiece& piece) {
    return piece.write == writes ? error.load() : 0;
  };
  auto p = Open();
  Write(*p, 0);
  p->Flush();
  for (const int e : {ENOSPC, EIO}) {
    writes = true;
    error = e;
    Write(*p, 1);
    p->Flush();
    error = 0;
    EXPECT_FALSE(Reads(*p, 1));
    EXPECT_TRUE(Reads(*p, 0));
    Write(*p, 1);
    EXPECT_TRUE(Reads(*p, 1));
    writes = false;
    error = e;
    EXPECT_FALSE(Reads(*p, 1));
    error = 0;
  }
  EXPECT_EQ(warnings_, 1);
}

TEST_P(KvPagerTest, AFullDiskLosesWhatDoesNotFit) {
  options_.file.records = 8;
  const KvPageShape& shape = options_.file.shape;
  options_.file.fault = [&](const IoPiece& piece) {
    return piece.write && piece.offset >= shape.record_offset(5) ? ENOSPC : 0;
  };
  auto p = Open();
  for (int r = 0; r < 8; r++) Write(*p, r);
  for (int r = 0; r < 8; r++) EXPECT_EQ(Reads(*p, r), r < 5) << r;
  EXPECT_EQ(warnings_, 1);
  EXPECT_THAT(warning_, HasSubstr("No space left on device"));
}

TEST_P(KvPagerTest, ReservesSpaceOrSaysWhatIsMissing) {
  options_.file.reserve = true;
  {
    auto p = Open();
    EXPECT_GE(std::filesystem::file_size(PathOf()), options_.file.shape.record_offset(12));
    EXPECT_EQ(FoundPages(*p), 0);
  }
  options_.file.shape = {64, int64_t{1} << 22};
  options_.file.records = 1 << 20;  // 256 TiB
  options_.file.key = {1, 1};
  options_.buffers = 4;
  const auto pager = KvPager::Open(options_, *memory_);
  EXPECT_EQ(pager.status().code(), absl::StatusCode::kResourceExhausted) << pager.status();
}

TEST_P(KvPagerTest, AFolderThatCannotBeIsAnError) {
  std::ofstream(dir_) << "a file";
  EXPECT_FALSE(KvPager::Open(options_, *memory_).ok());
}

INSTANTIATE_TEST_SUITE_P(Engines, KvPagerTest, testing::Values(IoEngine::kAuto, IoEngine::kThreads),
                         [](const auto& param) {
                           return param.param == IoEngine::kAuto ? "auto" : "threads";
                         });

TEST(KvPageFormat, BytesAreAsWrittenDown) {
  const KvPageShape shape{32, 65536};  // llama-8b, f16
  EXPECT_EQ(shape.part_bytes(), 1 << 20);
  EXPECT_EQ(shape.header_bytes(), 4096);
  EXPECT_EQ(shape.record_offset(0), 4096);
  EXPECT_EQ(shape.part_offset(2, 3), 4096 + 2 * (4096 + (32 << 20)) + 4096 + (3 << 20));
  const KvRecord record{{{1, 2}, {3, 4}}, 5, std::vector<uint64_t>(32, 6)};
  std::vector<uint8_t> bytes(shape.header_bytes());
  EncodeKvRecord(record, shape, {6, 7}, bytes.data());
  const auto word = [&](int at) {
    uint64_t w;
    memcpy(&w, &bytes[at], 8);
    return w;
  };
  EXPECT_EQ(word(8), 5u);
  EXPECT_EQ(word(16), 2u | uint64_t{32} << 32);
  EXPECT_EQ(word(24), 1u);
  EXPECT_EQ(word(32), 2u);
  EXPECT_EQ(word(48), 4u);
  EXPECT_EQ(word(56), 0u);
  EXPECT_EQ(word(280 + 31 * 8), 6u);
  KvRecord back;
  EXPECT_TRUE(DecodeKvRecord(bytes.data(), shape, {6, 7}, &back));
  EXPECT_EQ(back.checksums, record.checksums);
  EXPECT_EQ(back.prefix, record.prefix);
  EXPECT_FALSE(DecodeKvRecord(bytes.data(), shape, {6, 8}, &back)) << "another model's";
  EXPECT_FALSE(DecodeKvRecord(bytes.data(), {31, 65536}, {6, 7}, &back));
  for (size_t i = 0; i < 280 + 32 * 8; i++) {
    bytes[i] ^= 1;
    EXPECT_FALSE(DecodeKvRecord(bytes.data(), shape, {6, 7}, &back)) << i;
    bytes[i] ^= 1;
  }
}

}  // namespace
}  // namespace shoal
