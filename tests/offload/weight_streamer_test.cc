#include "offload/weight_streamer.h"

#include <errno.h>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/packed_matrix.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;

// A file of units whose every 8 bytes say which unit and where: any mixup shows.
class WeightStreamerTest : public testing::TestWithParam<IoEngine> {
 protected:
  void MakeUnits(std::vector<int64_t> bytes) {
    path_ = testing::TempDir() + "/streamer.bin";
    std::ofstream out(path_, std::ios::binary);
    int64_t offset = 0;
    for (size_t u = 0; u < bytes.size(); u++) {
      StreamUnit unit;
      unit.bytes = bytes[u];
      unit.file_offset = offset;
      int64_t padded = (bytes[u] + kIoAlignment - 1) / kIoAlignment * kIoAlignment;
      std::vector<uint64_t> words(padded / 8);
      for (size_t i = 0; i < words.size(); i++) words[i] = Word(u, i);
      out.write(reinterpret_cast<const char*>(words.data()), padded);
      offset += padded;
      options_.units.push_back(unit);
    }
    options_.path = path_;
    options_.file.engine = GetParam();
  }
  static uint64_t Word(uint64_t unit, uint64_t i) { return unit << 40 | i; }
  static bool Whole(int unit, const uint8_t* data, int64_t bytes) {
    for (int64_t i = 0; i < bytes / 8; i++) {
      uint64_t word;
      memcpy(&word, data + 8 * i, 8);
      if (word != Word(unit, i)) return false;
    }
    return true;
  }
  void Stream(std::vector<int> units) {
    for (int u : units) options_.units[u].tier = Tier::kStreamed;
    options_.cycle = units;
  }
  void Pass(WeightStreamer* s, const std::vector<int>& units) {
    for (int u : units) {
      auto data = s->Acquire(u);
      ASSERT_TRUE(data.ok()) << data.status();
      ASSERT_TRUE(Whole(u, *data, options_.units[u].bytes)) << "unit " << u;
      s->Release(u);
    }
  }
  ~WeightStreamerTest() override { std::filesystem::remove(path_); }

  std::string path_;
  StreamerOptions options_;
};

TEST_P(WeightStreamerTest, EveryPassSeesEveryUnitWhateverTheRing) {
  MakeUnits({100000, 3 << 20, 700000, 5 << 20, 64, (2 << 20) + 4096});
  Stream({0, 1, 3, 4, 5});
  for (int64_t ring : {5 << 20, 6 << 20, 9 << 20, 15 << 20, 40 << 20}) {
    options_.ring_bytes = ring;
    auto s = WeightStreamer::Create(options_);
    ASSERT_TRUE(s.ok()) << s.status();
    for (int pass = 0; pass < 4; pass++) Pass(s->get(), {0, 1, 2, 3, 4, 5});
    EXPECT_EQ((*s)->stats().seeks, 0);
    EXPECT_EQ((*s)->stats().streamed_units, 20);
  }
}

// The point of the ring: the bytes read are those of the streamed units, once for each pass, and
// what is read ahead at the end is what the ring holds.
TEST_P(WeightStreamerTest, ReadsNothingTwice) {
  MakeUnits({1 << 20, 1 << 20, 1 << 20, 1 << 20});
  Stream({1, 2, 3});
  options_.ring_bytes = 3 << 20;
  auto s = WeightStreamer::Create(options_);
  ASSERT_TRUE(s.ok());
  for (int pass = 0; pass < 10; pass++) Pass(s->get(), {0, 1, 2, 3});
  EXPECT_LE((*s)->stats().bytes_read, (1 + 3 * 10 + 3) << 20);
}

TEST_P(WeightStreamerTest, APassThatStartsOverGetsItsWeights) {
  MakeUnits({1 << 20, 2 << 20, 1 << 20, 3 << 20});
  Stream({0, 1, 2, 3});
  options_.ring_bytes = 7 << 20;
  auto s = WeightStreamer::Create(options_);
  ASSERT_TRUE(s.ok());
  Pass(s->get(), {0, 1, 2});
  Pass(s->get(), {0, 1, 2, 3, 0, 1});
  Pass(s->get(), {3, 2, 1, 0});
  Pass(s->get(), {0, 1, 2, 3});
  EXPECT_GT((*s)->stats().seeks, 0);
}

TEST_P(WeightStreamerTest, HoldingMoreThanTheRingIsAnErrorNotAHang) {
  MakeUnits({2 << 20, 2 << 20});
  Stream({0, 1});
  options_.ring_bytes = 3 << 20;
  auto s = WeightStreamer::Create(options_);
  ASSERT_TRUE(s.ok());
  ASSERT_TRUE((*s)->Acquire(0).ok());
  EXPECT_EQ((*s)->Acquire(1).status().code(), absl::StatusCode::kResourceExhausted);
  (*s)->Release(0);
  Pass(s->get(), {1, 0, 1});
}

// The head's norm and its matrix are asked for one by one.
TEST_P(WeightStreamerTest, AUnitMayBeHeldTwice) {
  MakeUnits({1 << 20, 1 << 20, 1 << 20});
  Stream({0, 1, 2});
  options_.ring_bytes = 2 << 20;
  auto s = WeightStreamer::Create(options_);
  ASSERT_TRUE(s.ok());
  for (int pass = 0; pass < 3; pass++) {
    for (int u : {0, 1, 2}) {
      auto first = (*s)->Acquire(u), second = (*s)->Acquire(u);
      ASSERT_TRUE(first.ok() && second.ok()) << first.status() << second.status();
      (*s)->Release(u);
      EXPECT_TRUE(Whole(u, *first, 1 << 20));
      (*s)->Release(u);
    }
  }
  EXPECT_EQ((*s)->stats().seeks, 0);
}

TEST_P(WeightStreamerTest, RingSmallerThanAUnitIsRefused) {
  MakeUnits({2 << 20, 2 << 20});
  Stream({0, 1});
  options_.ring_bytes = 1 << 20;
  EXPECT_EQ(WeightStreamer::Create(options_).status().code(), absl::StatusCode::kResourceExhausted);
}

TEST_P(WeightStreamerTest, ReadErrorIsReportedAndTheNextTryReadsAgain) {
  MakeUnits({1 << 20, 4 << 20, 1 << 20});
  Stream({0, 1, 2});
  options_.ring_bytes = 6 << 20;
  auto broken = std::make_shared<std::atomic<bool>>(true);
  options_.file.fault = [broken](const IoPiece& p) {
    return p.offset == 3 << 20 && broken->exchange(false) ? EIO : 0;
  };
  auto s = WeightStreamer::Create(options_);
  ASSERT_TRUE(s.ok());
  Pass(s->get(), {0});
  absl::Status error = (*s)->Acquire(1).status();
  EXPECT_THAT(
      std::string(error.message()),
      AllOf(HasSubstr("at byte 3145728"), HasSubstr("Input/output error"), HasSubstr(path_)));
  Pass(s->get(), {0, 1, 2, 0, 1, 2});
}

TEST_P(WeightStreamerTest, ReadErrorWhileLoadingResidentUnitsFailsCreate) {
  MakeUnits({8 << 20, 8 << 20});
  options_.file.fault = [](const IoPiece& p) { return p.offset == 10 << 20 ? EIO : 0; };
  EXPECT_FALSE(WeightStreamer::Create(options_).ok());
}

TEST_P(WeightStreamerTest, CheckRunsOncePerUnitAndItsErrorIsTheUnits) {
  MakeUnits({1 << 20, 1 << 20, 1 << 20});
  Stream({1, 2});
  options_.ring_bytes = 2 << 20;
  std::vector<int> checked;
  bool reject = false;
  options_.check = [&](int unit, const uint8_t* data) {
    checked.push_back(unit);
    EXPECT_TRUE(Whole(unit, data, options_.units[unit].bytes));
    return reject && unit == 2 ? absl::DataLossError("checksum") : absl::OkStatus();
  };
  auto s = WeightStreamer::Create(options_);
  ASSERT_TRUE(s.ok());
  Pass(s->get(), {1});
  reject = true;
  EXPECT_EQ((*s)->Acquire(2).status().code(), absl::StatusCode::kDataLoss);
  reject = false;
  Pass(s->get(), {1, 2, 1, 2});
  EXPECT_THAT(checked, testing::ElementsAre(0, 1, 2, 2));
}

TEST_P(WeightStreamerTest, ExpertsAreReadOnDemandAndStayWhileThereIsRoom) {
  MakeUnits({1 << 20, 500000, 500000, 500000, 500000, 500000, 1 << 20});
  for (int u = 1; u <= 5; u++) options_.units[u].tier = Tier::kOnDemand;
  Stream({0, 6});
  options_.ring_bytes = 2 << 20;
  options_.expert_slots = 3;
  auto s = WeightStreamer::Create(options_);
  ASSERT_TRUE(s.ok());
  (*s)->Prefetch({2, 4});
  Pass(s->get(), {0, 2, 4, 6, 0, 2, 4, 6});
  EXPECT_EQ((*s)->stats().expert_reads, 2);
  Pass(s->get(), {1, 3, 5, 2});
  EXPECT_EQ((*s)->stats().expert_reads, 6);
  // All three slots held: the fourth is refused, not waited for.
  for (int u : {1, 2, 3}) ASSERT_TRUE((*s)->Acquire(u).ok());
  EXPECT_EQ((*s)->Acquire(4).status().code(), absl::StatusCode::kResourceExhausted);
  for (int u : {1, 2, 3}) (*s)->Release(u);
  Pass(s->get(), {4});
}

// What the pass waits for goes before everything that is only read ahead.
TEST_P(WeightStreamerTest, DemandGoesBeforeReadingAhead) {
  MakeUnits({64 << 20, 1 << 20});
  Stream({0});
  options_.units[1].tier = Tier::kOnDemand;
  options_.ring_bytes = 64 << 20;
  options_.expert_slots = 1;
  // Reading ahead stops after the tenth piece until the expert was asked for.
  struct Gate {
    std::mutex mu;
    std::condition_variable cv;
    bool open = false;
    std::vector<int64_t> offsets;
  };
  auto gate = std::make_shared<Gate>();
  options_.file.fault = [gate](const IoPiece& p) {
    std::unique_lock<std::mutex> lock(gate->mu);
    gate->offsets.push_back(p.offset);
    gate->cv.notify_all();
    gate->cv.wait(lock, [&] { return gate->open || gate->offsets.size() < 10; });
    return 0;
  };
  auto s = WeightStreamer::Create(options_);
  ASSERT_TRUE(s.ok());
  {
    std::unique_lock<std::mutex> lock(gate->mu);
    gate->cv.wait(lock, [&] { return gate->offsets.size() == 10; });
  }
  (*s)->Prefetch({1});
  {
    std::unique_lock<std::mutex> lock(gate->mu);
    gate->open = true;
    gate->cv.notify_all();
  }
  Pass(s->get(), {1, 0});
  std::unique_lock<std::mutex> lock(gate->mu);
  EXPECT_EQ(gate->offsets[10], 64 << 20);
}

TEST_P(WeightStreamerTest, EmbeddingReadsOnlyTheRowsAskedFor) {
  const int64_t panel = 10016;
  MakeUnits({panel * 300, 1 << 20});
  options_.units[0].tier = Tier::kRows;
  options_.units[0].panel_bytes = panel;
  auto s = WeightStreamer::Create(options_);
  ASSERT_TRUE(s.ok());
  int64_t before = (*s)->stats().bytes_read;
  for (std::vector<int32_t> rows :
       {std::vector<int32_t>{-1, 4799, 0, 17, 16, 333, 2000}, {5}, {-1}}) {
    auto data = (*s)->AcquireRows(0, rows);
    ASSERT_TRUE(data.ok()) << data.status();
    for (int32_t row : rows) {
      if (row < 0) continue;
      int64_t p = row / kPanelRows;
      for (int64_t i = p * panel / 8; i < (p + 1) * panel / 8; i++) {
        uint64_t word;
        memcpy(&word, *data + 8 * i, 8);
        ASSERT_EQ(word, Word(0, i));
      }
    }
    (*s)->Release(0);
  }
  EXPECT_LT((*s)->stats().bytes_read - before, 7 * (panel + 2 * kIoAlignment));
}

TEST_P(WeightStreamerTest, LoaderTakesThePlaceOfAFile) {
  MakeUnits({1 << 20, 300000, 1 << 20, 64 * 20});
  Stream({1, 2});
  options_.units[3].tier = Tier::kRows;
  options_.units[3].panel_bytes = 64;
  options_.ring_bytes = 2 << 20;
  options_.path.clear();
  options_.loader_threads = 2;
  std::atomic<int> fail{-1};
  options_.load = [&](int unit, uint8_t* out) {
    if (unit == fail.load()) return absl::DataLossError("the file shrank");
    for (int64_t i = 0; i < options_.units[unit].bytes / 8; i++) {
      uint64_t word = Word(unit, i);
      memcpy(out + 8 * i, &word, 8);
    }
    return absl::OkStatus();
  };
  options_.load_panel = [](int unit, int64_t panel, uint8_t* out) {
    memset(out, static_cast<int>(panel), 64);
    return absl::OkStatus();
  };
  auto s = WeightStreamer::Create(options_);
  ASSERT_TRUE(s.ok());
  for (int i = 0; i < 5; i++) Pass(s->get(), {0, 1, 2});
  auto rows = (*s)->AcquireRows(3, {35, 1});
  ASSERT_TRUE(rows.ok());
  EXPECT_EQ((*rows)[0], 0);
  EXPECT_EQ((*rows)[2 * 64], 2);
  (*s)->Release(3);
  fail = 2;
  Pass(s->get(), {1});
  // What was prefetched before the fault is still good; what is read after it is not.
  int failures = 0;
  for (int i = 0; i < 3; i++) {
    auto data = (*s)->Acquire(2);
    if (!data.ok()) {
      failures++;
      EXPECT_EQ(data.status().code(), absl::StatusCode::kDataLoss);
      continue;
    }
    (*s)->Release(2);
  }
  EXPECT_GE(failures, 1);
}

INSTANTIATE_TEST_SUITE_P(Engines, WeightStreamerTest,
                         testing::Values(IoEngine::kAuto, IoEngine::kThreads),
                         [](const auto& info) {
                           return info.param == IoEngine::kThreads ? "threads" : "auto";
                         });

}  // namespace
}  // namespace shoal
