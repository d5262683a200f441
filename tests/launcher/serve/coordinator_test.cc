#include "launcher/coordinator.h"

#include <map>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/launcher/serve/tiny_tokenizer.h"

namespace shoal {
namespace {

namespace pb = ::shoal::engine::v1;
using ::testing::ElementsAre;

// An engine that answers when the test says so.
class FakeEngine : public EngineLink {
 public:
  void Send(const pb::ToEngine& message) override {
    if (message.has_submit()) submits[message.submit().id()] = message.submit();
    if (message.has_cancel()) cancelled.push_back(message.cancel().id());
  }
  std::map<uint64_t, pb::Submit> submits;
  std::vector<uint64_t> cancelled;
};

struct Heard {
  std::string text;
  std::vector<int32_t> tokens;
  std::vector<GenerateUpdate> ends;
};

class CoordinatorTest : public ::testing::Test {
 protected:
  CoordinatorTest()
      : tokenizer_(MakeTinyTokenizer({})),
        coordinator_(*tokenizer_, {.requests = 4, .prompt_tokens = 100, .deaths = 2}, metrics_) {
    coordinator_.SetLink(&engine_);
  }
  void Up() {
    engine_.submits.clear();
    pb::Hello hello;
    hello.set_context(32);
    hello.set_kv_tokens(64);
    coordinator_.OnEngineUp(hello);
  }
  absl::StatusOr<uint64_t> Submit(int prompt, Heard& heard, std::vector<std::string> stop = {}) {
    GenerateRequest r;
    r.prompt.assign(prompt, TinyByte('p'));
    r.stop = std::move(stop);
    return coordinator_.Submit(std::move(r), [&heard](const GenerateUpdate& u) {
      heard.text += u.text;
      for (const auto& t : u.tokens) heard.tokens.push_back(t.token);
      if (u.done()) heard.ends.push_back(u);
    });
  }
  void Token(uint64_t id, char c, pb::Finish finish = pb::FINISH_NONE) {
    pb::Events events;
    pb::Event& e = *events.add_events();
    e.set_id(id);
    e.set_has_token(true);
    e.set_token(TinyByte(c));
    e.set_finish(finish);
    coordinator_.OnEngineEvents(events);
  }

  const std::unique_ptr<Tokenizer> tokenizer_;
  Metrics metrics_;
  FakeEngine engine_;
  Coordinator coordinator_;
};

TEST_F(CoordinatorTest, StreamContinuesOverADeadEngine) {
  Up();
  Heard heard;
  const auto id = Submit(3, heard);
  ASSERT_TRUE(id.ok());
  Token(*id, 'a');
  Token(*id, 'b');
  coordinator_.OnEngineDown("killed");
  EXPECT_TRUE(heard.ends.empty());
  Up();
  const pb::Submit& again = engine_.submits.at(*id);
  EXPECT_EQ(again.prompt_length(), 3);
  EXPECT_THAT(again.tokens(), ElementsAre(TinyByte('p'), TinyByte('p'), TinyByte('p'),
                                          TinyByte('a'), TinyByte('b')));
  Token(*id, 'c', pb::FINISH_LENGTH);
  EXPECT_EQ(heard.text, "abc");
  ASSERT_EQ(heard.ends.size(), 1U);
  EXPECT_EQ(heard.ends[0].finish, FinishReason::kLength);
  EXPECT_EQ(heard.ends[0].completion_tokens, 3);
  EXPECT_EQ(coordinator_.unfinished(), 0U);
}

TEST_F(CoordinatorTest, RequestThatKillsEveryEngineEnds) {
  Up();
  Heard poison;
  ASSERT_TRUE(Submit(1, poison).ok());
  coordinator_.OnEngineDown("killed");
  Up();
  Heard late;
  const auto good = Submit(1, late);
  coordinator_.OnEngineDown("killed");
  ASSERT_EQ(poison.ends.size(), 1U);
  EXPECT_EQ(poison.ends[0].error.code(), absl::StatusCode::kInternal);
  Up();
  EXPECT_TRUE(late.ends.empty());
  Token(*good, 'x', pb::FINISH_STOP);
  EXPECT_EQ(late.text, "x");
}

TEST_F(CoordinatorTest, RequestsDuringARestartWait) {
  Up();
  coordinator_.OnEngineDown("killed");
  Heard heard;
  const auto id = Submit(2, heard);
  ASSERT_TRUE(id.ok());
  EXPECT_TRUE(engine_.submits.empty());
  Up();
  EXPECT_EQ(engine_.submits.count(*id), 1U);
}

TEST_F(CoordinatorTest, FailedForGoodRefusesAndTellsWhy) {
  Heard early;
  EXPECT_EQ(Submit(1, early).status().code(), absl::StatusCode::kUnavailable);  // still loading
  Up();
  Heard heard;
  ASSERT_TRUE(Submit(1, heard).ok());
  coordinator_.OnEngineFailed("out of memory");
  ASSERT_EQ(heard.ends.size(), 1U);
  EXPECT_EQ(heard.ends[0].error.code(), absl::StatusCode::kUnavailable);
  const auto refused = Submit(1, heard);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(refused.status().message()), ::testing::HasSubstr("out of memory"));
  Up();
  EXPECT_TRUE(Submit(1, heard).ok());
}

TEST_F(CoordinatorTest, LimitsByRequestsAndTokens) {
  Up();
  Heard heard;
  const auto too_long = Submit(32, heard);
  EXPECT_EQ(too_long.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(
      std::string(too_long.status().message()),
      ::testing::AllOf(::testing::HasSubstr("32 tokens"), ::testing::HasSubstr("holds 32")));
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(Submit(30, heard).ok());
  EXPECT_EQ(Submit(20, heard).status().code(), absl::StatusCode::kResourceExhausted);
  ASSERT_TRUE(Submit(1, heard).ok());
  EXPECT_EQ(Submit(1, heard).status().code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(CoordinatorTest, StopStringEndsAtTheEngineToo) {
  Up();
  Heard heard;
  const auto id = Submit(1, heard, {"xy"});
  Token(*id, 'a');
  Token(*id, 'x');
  EXPECT_EQ(heard.text, "a");
  Token(*id, 'y');
  ASSERT_EQ(heard.ends.size(), 1U);
  EXPECT_EQ(heard.ends[0].finish, FinishReason::kStop);
  EXPECT_THAT(engine_.cancelled, ElementsAre(*id));
  Token(*id, 'z');  // was under way
  EXPECT_EQ(heard.text, "a");
}

TEST_F(CoordinatorTest, CancelledIsSilent) {
  Up();
  Heard heard;
  const auto id = Submit(1, heard);
  coordinator_.Cancel(*id);
  coordinator_.Cancel(*id);
  Token(*id, 'a', pb::FINISH_CANCELLED);
  EXPECT_TRUE(heard.ends.empty());
  EXPECT_EQ(heard.text, "");
  EXPECT_THAT(engine_.cancelled, ElementsAre(*id));
}

TEST_F(CoordinatorTest, SinkMayCancelItsOwnGeneration) {
  Up();
  GenerateRequest r;
  r.prompt = {TinyByte('p')};
  uint64_t id = 0;
  int calls = 0;
  const auto submitted = coordinator_.Submit(r, [&](const GenerateUpdate&) {
    ++calls;
    coordinator_.Cancel(id);
  });
  id = *submitted;
  Token(id, 'a');
  Token(id, 'b');
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(coordinator_.unfinished(), 0U);
}

TEST_F(CoordinatorTest, DeadlinePasses) {
  Up();
  GenerateRequest r;
  r.prompt = {TinyByte('p')};
  r.deadline = std::chrono::steady_clock::now();
  absl::Status end;
  ASSERT_TRUE(coordinator_.Submit(r, [&](const GenerateUpdate& u) { end = u.error; }).ok());
  coordinator_.Tick();
  EXPECT_EQ(end.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(engine_.cancelled.size(), 1U);
}

TEST_F(CoordinatorTest, PrefixesAreSharedWithinOneKeyOnly) {
  Up();
  const auto salt_of = [&](const std::string& client) {
    GenerateRequest r;
    r.prompt = {TinyByte('p')};
    r.client = client;
    const auto id = coordinator_.Submit(r, [](const GenerateUpdate&) {});
    const pb::Submit& s = engine_.submits.at(*id);
    return std::make_pair(s.salt_low(), s.salt_high());
  };
  EXPECT_EQ(salt_of("alice"), salt_of("alice"));
  EXPECT_NE(salt_of("alice"), salt_of("bob"));
}

}  // namespace
}  // namespace shoal
