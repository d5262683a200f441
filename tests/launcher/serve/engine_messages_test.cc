#include "launcher/engine_messages.h"

#include "gtest/gtest.h"
#include "launcher/trace_parent.h"

namespace shoal {
namespace {

TEST(EngineMessages, NothingIsLostOnTheWay) {
  SequenceRequest r;
  r.tokens = {3, 1, 2};
  r.prompt_length = 2;
  r.max_tokens = 9;
  r.stop_tokens = {7, 8};
  r.client = "alice";
  r.salt = {1, 2};
  r.embed = true;
  r.sampling = {.temperature = 1.5f,
                .top_k = 4,
                .top_p = 0.5f,
                .min_p = 0.25f,
                .repeat_penalty = 1.25f,
                .presence_penalty = 0.75f,
                .frequency_penalty = -0.5f,
                .penalty_last_n = 11,
                .seed = 13,
                .logprobs = 5,
                .logit_bias = {{2, -1.f}, {9, 3.f}}};
  const SequenceRequest back = FromMessage(ToMessage(r));
  EXPECT_EQ(back.tokens, r.tokens);
  EXPECT_EQ(back.prompt_length, r.prompt_length);
  EXPECT_EQ(back.max_tokens, r.max_tokens);
  EXPECT_EQ(back.stop_tokens, r.stop_tokens);
  EXPECT_EQ(back.client, r.client);
  EXPECT_EQ(back.salt, r.salt);
  EXPECT_EQ(back.embed, r.embed);
  EXPECT_EQ(back.sampling, r.sampling);
}

TEST(TraceParent, OnlyWellFormedOnesPass) {
  const std::string_view good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
  EXPECT_EQ(TraceParent(good), good);
  for (const char* bad : {"", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0",
                          "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
                          "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
                          "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
                          "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
                          "00-4bf92f3577b34da6a3ce929d0e0e4736 00f067aa0ba902b7-01"}) {
    EXPECT_EQ(TraceParent(bad), "") << bad;
  }
}

}  // namespace
}  // namespace shoal
