// Steps whose sums are the one-shot kernel's: recorded and replayed by all ranks, with the bits of
// steps that are enqueued and of sums by NCCL; a rank that ends is an error of the others.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "simt/api.h"
#include "tests/simt/fake_nccl.h"
#include "tests/simt/parity_fixture.h"

namespace shoal {
namespace {

class OneShotSteps : public SimtParity {
 protected:
  OneShotSteps() : unmeasured_("SHOAL_PEER_SUMS", "1") { simt::SetDevices(2); }
  ~OneShotSteps() override {
    simt::SetDevices(1);
    simt::RefusePeerAccess(false);
    EXPECT_EQ(simtNcclMisuses(), 0);
  }
  static constexpr const char* kTwo = "gh";
  const ScopedEnv unmeasured_;
};

TEST_F(OneShotSteps, AreReplayedByBothRanksWithTheSameBits) {
  more_ = {{9, 8}};
  late_ = {8, 4};
  TinyModel m = Model(DType::kQ4_0);
  m.window = 24;
  Make(m);
  for (const bool peers : {true, false}) {  // through peer memory, through the host's
    simt::RefusePeerAccess(!peers);
    ExpectSameReplayed({kTwo, 2}, "SHOAL_GRAPH_SUMS", /*recorded=*/1, /*replayed=*/2);
  }
  const Answer own = Do({kTwo, 2});
  const ScopedEnv by_nccl("SHOAL_PEER_SUMS", "0");
  const Answer nccl = Do({kTwo, 2});
  EXPECT_EQ(own.greedy, nccl.greedy);  // the sum of two has one order
  EXPECT_EQ(own.logits, nccl.logits);
}

// A rank that ends in the middle of its steps.
TEST_F(OneShotSteps, APeerThatEndsDuringAReplayIsAnError) {
  Make(Model(DType::kF32));
  Struck struck;
  Strike([](auto& worlds) { worlds[1]->Abort(absl::UnavailableError("rank 1 was killed")); },
         &struck);
  EXPECT_EQ(struck.engine.message(), "rank 1 was killed");
  EXPECT_EQ(struck.worker.message(), "rank 1 was killed");
}

}  // namespace
}  // namespace shoal
