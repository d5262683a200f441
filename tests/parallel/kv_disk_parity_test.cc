// KV pages on disk do not change the answer: sequences that gave way and came back, and prompts
// that an earlier engine computed, continue with the same bits, under any split, whatever became
// of the pages.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "tests/parallel/kv_disk_fixture.h"

namespace shoal {
namespace {

using Answer = KvDiskAnswer;
class KvDiskParity : public KvDiskFixture {};

const std::vector<std::pair<int, int>> kThree = {{1, 400}, {2, 350}, {3, 300}};

TEST_F(KvDiskParity, SequencesThatGaveWayComeBackFromDisk) {
  for (const auto& [tp, pp] : {std::pair{1, 1}, std::pair{2, 1}, std::pair{1, 2}}) {
    options_.kv_tokens = 0;
    options_.kv_disk = {};
    const Answer roomy = Do(tp, pp, kThree, 200);
    EXPECT_EQ(roomy.stats.preempted, 0);
    options_.kv_tokens = 1200;  // admits all three, and is too small for them as they grow
    options_.kv_disk = {dir(), false, 256 << 20, nullptr};
    const Answer tight = Do(tp, pp, kThree, 200);
    EXPECT_GT(tight.stats.preempted, 0);
    EXPECT_GT(tight.stats.pages_written, 0);
    EXPECT_GT(tight.stats.disk_tokens, 0) << "tp " << tp << " pp " << pp;
    EXPECT_EQ(tight.failed, 0);
    EXPECT_TRUE(SameText(roomy, tight)) << "tp " << tp << " pp " << pp;
  }
}

// The answers to one prompt share its blocks, the partly filled last one until they write to it.
TEST_F(KvDiskParity, AnswersToOnePromptAreThoseOfSeparateRequests) {
  temperature_ = 1;
  const std::vector<std::pair<int, int>> work = {{1, 300}, {1, 300}, {2, 8}, {1, 300}, {2, 8}};
  options_.sequences = 5;
  for (const auto& [tp, pp] : {std::pair{1, 1}, std::pair{2, 1}, std::pair{1, 2}}) {
    options_.kv_tokens = 0;
    options_.kv_disk = {};
    options_.prefix_cache = false;
    const Answer separate = Do(tp, pp, work, 100);
    EXPECT_NE(separate.tokens.at(1), separate.tokens.at(2));
    options_.prefix_cache = true;
    const Answer shared = Do(tp, pp, work, 100);
    EXPECT_EQ(shared.stats.cached_tokens, 2 * 300 + 8) << "tp " << tp << " pp " << pp;
    EXPECT_TRUE(SameText(separate, shared)) << "tp " << tp << " pp " << pp;
    options_.kv_tokens = 600;  // too small for all as they grow
    options_.kv_disk = {dir(), false, 256 << 20, nullptr};
    const Answer tight = Do(tp, pp, work, 100);
    EXPECT_GT(tight.stats.preempted, 0);
    EXPECT_TRUE(SameText(separate, tight)) << "tp " << tp << " pp " << pp;
  }
}

TEST_F(KvDiskParity, PromptsSurviveARestart) {
  for (const auto& [tp, pp] : {std::pair{1, 1}, std::pair{2, 1}, std::pair{1, 2}}) {
    options_.kv_disk = {};
    const Answer plain = Do(tp, pp, kThree, 20);
    options_.kv_disk = {dir(), true, 256 << 20, nullptr};
    const Answer first = Do(tp, pp, kThree, 20);
    EXPECT_EQ(first.stats.disk_tokens, 0);
    const Answer second = Do(tp, pp, kThree, 20);
    // Full blocks of the prompts, all but the last token.
    EXPECT_EQ(second.stats.disk_tokens, 384 + 336 + 288) << "tp " << tp << " pp " << pp;
    EXPECT_TRUE(SameText(plain, first));
    EXPECT_TRUE(SameText(plain, second));
  }
}

TEST_F(KvDiskParity, DamagedPagesAreComputedAgain) {
  const Answer plain = Do(2, 1, kThree, 20);
  int warnings = 0;
  options_.kv_disk = {dir(), true, 256 << 20, nullptr};
  Do(2, 1, kThree, 20);
  // One byte in the middle of the data of one rank's file.
  std::string file;
  for (const auto& e : std::filesystem::directory_iterator(dir())) {
    if (e.path().extension() == ".pages") file = e.path();
  }
  const KvPageShape shape = {4, int64_t{config_.kv_heads} / 2 * config_.head_dim * 2 * 2 * 16};
  std::fstream f(file, std::ios::in | std::ios::out | std::ios::binary);
  f.seekp(shape.part_offset(0, 2) + 100);
  f.put('x').put('y').put('z').put('x').put('y').put('z');
  f.close();
  options_.kv_disk.warn = [&warnings](const std::string&) { ++warnings; };
  const Answer second = Do(2, 1, kThree, 20);
  EXPECT_GT(second.failed, 0);
  EXPECT_EQ(second.stats.pages_lost, 1);
  EXPECT_EQ(warnings, 1);
  EXPECT_LT(second.stats.disk_tokens, 384 + 336 + 288);
  EXPECT_GT(second.stats.disk_tokens, 0);
  EXPECT_TRUE(SameText(plain, second));
  EXPECT_EQ(Do(2, 1, kThree, 20).stats.disk_tokens, 384 + 336 + 288) << "written again";
}

constexpr std::pair<int, int> kSplits[] = {{1, 1}, {2, 1}, {1, 2}, {2, 2}};

TEST_F(KvDiskParity, AContextMayBeLargerThanMemory) {
  options_.context = 2000;
  const std::vector<std::pair<int, int>> work = {{1, 1800}, {2, 700}, {3, 20}};
  for (const KvType type : {KvType::kF16, KvType::kQ8_0}) {
    options_.kv_type = type;
    for (const auto& [tp, pp] : kSplits) {
      options_.kv_tokens = 0;
      options_.kv_disk = {};
      const Answer roomy = Do(tp, pp, work, 100);
      options_.kv_tokens = 800;  // the second one becomes too large only as it grows
      options_.kv_disk.dir = dir();
      options_.kv_disk.bytes = 256 << 20;
      const Answer tight = Do(tp, pp, work, 100);
      EXPECT_GE(tight.stats.pages_streamed, 5) << "tp " << tp << " pp " << pp;
      EXPECT_EQ(tight.failed, 0);
      EXPECT_TRUE(SameText(roomy, tight)) << "tp " << tp << " pp " << pp;
    }
  }
}

// Layers with a window read the pages that it reaches, the others all.
TEST_F(KvDiskParity, WindowsOfSomeLayersSeeThePagesTheyReach) {
  TinyModel m;
  m.architecture = "gpt-oss";
  m.experts = 4;
  m.ffn = 96;
  m.dim = 128;
  m.window = 1000;
  m.layers = 4;
  m.type = DType::kQ8_0;
  m.context = 2048;
  Use(m);
  options_.context = 2000;
  const std::vector<std::pair<int, int>> work = {{1, 1800}, {2, 200}};
  for (const auto& [tp, pp] : kSplits) {
    options_.kv_tokens = 0;
    options_.kv_disk = {};
    const Answer roomy = Do(tp, pp, work, 40);
    options_.kv_tokens = 800;
    options_.kv_disk = {dir(), false, 256 << 20, nullptr};
    const Answer tight = Do(tp, pp, work, 40);
    EXPECT_GE(tight.stats.pages_streamed, 5) << "tp " << tp << " pp " << pp;
    EXPECT_EQ(tight.failed, 0);
    EXPECT_TRUE(SameText(roomy, tight)) << "tp " << tp << " pp " << pp;
  }
}

TEST_F(KvDiskParity, OthersRunBesideAContextThatIsStreamed) {
  options_.context = 2000;
  const std::vector<std::pair<int, int>> work = {{1, 1800}, {2, 200}, {3, 30}};
  for (const auto& [tp, pp] : kSplits) {
    options_.kv_tokens = 0;
    options_.kv_disk = {};
    at_once_ = 0;
    const Answer roomy = Do(tp, pp, work, 60);
    options_.kv_tokens = 1000;
    options_.kv_disk.dir = dir();
    options_.kv_disk.bytes = 256 << 20;
    at_once_ = 1;
    const Answer tight = Do(tp, pp, work, 60);
    EXPECT_GE(tight.stats.pages_streamed, 5) << "tp " << tp << " pp " << pp;
    EXPECT_EQ(tight.ended.front(), 1) << "it began first, and is not held up for long";
    EXPECT_EQ(tight.stats.preempted, 0);
    EXPECT_GT(tight.beside, 60) << "the others waited";
    EXPECT_TRUE(SameText(roomy, tight)) << "tp " << tp << " pp " << pp;
  }
}

TEST_F(KvDiskParity, ALongPromptStartsFromItsPagesOnDisk) {
  options_.context = 2000;
  const std::vector<std::pair<int, int>> work = {{1, 1800}};
  for (const auto& [tp, pp] : kSplits) {
    options_.kv_tokens = 0;
    options_.kv_disk = {};
    const Answer roomy = Do(tp, pp, work, 20);
    options_.kv_tokens = 800;
    options_.kv_disk.dir = dir();
    options_.kv_disk.keep = true;
    options_.kv_disk.bytes = 256 << 20;
    const Answer first = Do(tp, pp, work, 20);
    const Answer second = Do(tp, pp, work, 20);
    EXPECT_EQ(second.stats.disk_tokens, 1792) << "tp " << tp << " pp " << pp;
    EXPECT_TRUE(SameText(roomy, first));
    EXPECT_TRUE(SameText(roomy, second));
  }
}

TEST_F(KvDiskParity, APageLostWhileItIsStreamedIsComputedAgain) {
  options_.context = 2000;
  const std::vector<std::pair<int, int>> work = {{1, 1800}};
  const Answer plain = Do(2, 2, work, 20);
  options_.kv_tokens = 800;
  options_.kv_disk.dir = dir();
  options_.kv_disk.keep = true;
  options_.kv_disk.bytes = 256 << 20;
  int warnings = 0;
  options_.kv_disk.warn = [&warnings](const std::string&) { ++warnings; };
  Do(2, 2, work, 20);
  std::string file;
  for (const auto& e : std::filesystem::directory_iterator(dir())) {
    if (e.path().extension() == ".pages") file = e.path();
  }
  const KvPageShape shape = {2, int64_t{config_.kv_heads} / 2 * config_.head_dim * 2 * 2 * 16};
  std::fstream f(file, std::ios::in | std::ios::out | std::ios::binary);
  f.seekp(shape.part_offset(2, 1) + 100);
  f.put('x').put('y').put('z').put('x').put('y').put('z');
  f.close();
  const Answer second = Do(2, 2, work, 20);
  EXPECT_EQ(warnings, 1);
  EXPECT_GT(second.failed, 0);
  EXPECT_EQ(second.stats.pages_lost, 1);
  EXPECT_TRUE(SameText(plain, second));
  EXPECT_EQ(Do(2, 2, work, 20).stats.pages_lost, 0) << "written again";
}

TEST_F(KvDiskParity, AnotherTypeOrPlanFindsNothing) {
  options_.kv_disk = {dir(), true, 256 << 20, nullptr};
  Do(1, 1, kThree, 4);
  options_.kv_type = KvType::kF32;
  EXPECT_EQ(Do(1, 1, kThree, 4).stats.disk_tokens, 0);
  EXPECT_EQ(Do(1, 2, kThree, 4).stats.disk_tokens, 0) << "another plan";
}

}  // namespace
}  // namespace shoal
