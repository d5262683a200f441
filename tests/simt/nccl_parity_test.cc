// Steps with sums between two devices over the stand-in for NCCL: recorded and replayed by both
// ranks or by none, with the bits of steps that are enqueued, and gone before their communicator.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <atomic>
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

class NcclSteps : public SimtParity {
 protected:
  NcclSteps() : by_nccl_("SHOAL_PEER_SUMS", "0") { simt::SetDevices(2); }
  ~NcclSteps() override {
    simt::SetDevices(1);
    EXPECT_EQ(simtNcclMisuses(), 0);
  }
  static constexpr const char* kTwo = "gh";
  const ScopedEnv by_nccl_;
};

TEST_F(NcclSteps, AreReplayedByBothRanksWithTheSameBits) {
  more_ = {{9, 8}};
  late_ = {8, 4};  // what is recorded with 3 rows of 4 is replayed with 4
  for (const auto& [architecture, experts] :
       {std::pair{"llama", 0}, {"gpt-oss", 4}, {"glm4moe", 4}}) {
    SCOPED_TRACE(architecture);
    TinyModel m = Model(experts > 0 ? DType::kF32 : DType::kQ4_0);
    m.architecture = architecture;
    m.experts = experts;
    if (experts > 0) m.ffn = 128;
    m.window = 24;
    Make(m);
    ExpectSameReplayed({kTwo, 2}, "SHOAL_GRAPH_SUMS", /*recorded=*/1, /*replayed=*/2);
  }
}

// What a rank says when its work fails in the middle of a replay.
TEST_F(NcclSteps, APeerThatFailsDuringAReplayIsAnErrorOfBoth) {
  Make(Model(DType::kF32));
  Struck struck;
  Strike([](auto&) { simtNcclFailAfter(3); }, &struck);
  EXPECT_EQ(struck.engine.code(), absl::StatusCode::kUnavailable) << struck.engine;
  EXPECT_NE(struck.engine.message().find("remote process exited"), std::string::npos)
      << struck.engine;
  EXPECT_FALSE(struck.graphs_on);
  EXPECT_EQ(struck.worker.code(), absl::StatusCode::kUnavailable) << struck.worker;
}

TEST_F(NcclSteps, ARankThatCannotRecordKeepsTheOtherFromIt) {
  Make(Model(DType::kF32));
  const Answer plain = [&] {
    const ScopedEnv off("SHOAL_GRAPH_SUMS", "0");
    return Do({kTwo, 2});
  }();
  for (const bool late : {false, true}) {  // at the beginning of the capture, or within
    SCOPED_TRACE(late);
    simt::RefuseGraphsOf(late ? 0 : 1, late);
    const Answer answer = Do({kTwo, 2});
    simt::RefuseGraphsOf(-1, false);
    EXPECT_EQ(answer.replayed, 0);
    EXPECT_EQ(answer.greedy, plain.greedy);
    EXPECT_EQ(answer.logits, plain.logits);
  }
}

}  // namespace
}  // namespace shoal
