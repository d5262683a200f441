// KV pages between a device's memory and the disk: the same tokens and probabilities, to the bit,
// as a run that has memory for all. The stand-in's streams run in any order that events allow, so a
// missing wait shows.
#include "cuda_runtime.h"
#include "kernels/cuda/backend.h"
#include "tests/parallel/kv_disk_fixture.h"

namespace shoal {
namespace {

using Answer = KvDiskAnswer;
using Work = std::vector<std::pair<int, int>>;

// Prompts end with a whole block, and what a restart leaves of one to compute has 16 rows: a GPU
// takes another path for fewer, with other roundings.
class KvDiskOnDevice : public KvDiskFixture {
 protected:
  KvDiskOnDevice() {
    options_.context = 256;
    options_.make_backend = []() -> absl::StatusOr<std::unique_ptr<Backend>> {
      return cuda::CudaBackend::Create(0);
    };
  }
  void PageToDisk(int kv_tokens, bool keep) {
    options_.kv_tokens = kv_tokens;
    options_.kv_disk.dir = dir();
    options_.kv_disk.keep = keep;
    options_.kv_disk.bytes = 64 << 20;
  }
};

TEST_F(KvDiskOnDevice, SequencesThatGaveWayComeBackFromDisk) {
  const Work work = {{1, 64}, {2, 48}, {3, 48}};
  for (const auto& [tp, pp] : {std::pair{1, 1}, std::pair{2, 1}, std::pair{1, 2}}) {
    SCOPED_TRACE(testing::Message() << "tp " << tp << " pp " << pp);
    options_.kv_tokens = 0;
    options_.kv_disk = {};
    const Answer roomy = Do(tp, pp, work, 24);
    PageToDisk(192, false);  // admits all three, and is too small for them as they grow
    const Answer tight = Do(tp, pp, work, 24);
    EXPECT_GT(tight.stats.preempted, 0);
    EXPECT_GT(tight.stats.disk_tokens, 0);
    EXPECT_EQ(tight.failed, 0);
    EXPECT_TRUE(SameText(roomy, tight));
  }
}

TEST_F(KvDiskOnDevice, PromptsSurviveARestart) {
  const Work work = {{1, 64}};  // one: a second might be computed where that is faster than to read
  const Answer plain = Do(1, 1, work, 6);
  PageToDisk(0, true);
  const Answer first = Do(1, 1, work, 6);
  EXPECT_EQ(first.stats.disk_tokens, 0);
  const Answer second = Do(1, 1, work, 6);
  EXPECT_EQ(second.stats.disk_tokens, 48);
  EXPECT_TRUE(SameText(plain, first));
  EXPECT_TRUE(SameText(plain, second));
  // The pages are those of any rank with this share of the model: a CPU goes on from them.
  options_.make_backend = nullptr;
  EXPECT_EQ(Do(1, 1, work, 6).stats.disk_tokens, 48);
}

TEST_F(KvDiskOnDevice, AContextMayBeLargerThanTheDevicesMemory) {
  options_.context = 1040;
  const Work work = {{1, 1000}};
  const Answer roomy = Do(1, 1, work, 5);
  PageToDisk(768, false);
  const Answer tight = Do(1, 1, work, 5);
  EXPECT_GE(tight.stats.pages_streamed, 1);
  EXPECT_EQ(tight.failed, 0);
  EXPECT_TRUE(SameText(roomy, tight));
}

}  // namespace
}  // namespace shoal
