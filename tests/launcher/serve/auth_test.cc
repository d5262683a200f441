#include "launcher/auth.h"

#include "gtest/gtest.h"

namespace shoal {
namespace {

using std::chrono::seconds;
using Clock = std::chrono::steady_clock;

TEST(ApiKeys, NamesAndKeys) {
  const auto keys = ApiKeys::Parse("# people\nalice:sk-alice-1234\n\n  sk-nameless-99 \n");
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_TRUE(keys->required());
  EXPECT_EQ(keys->Identify("sk-alice-1234"), "alice");
  EXPECT_EQ(keys->Identify("sk-nameless-99"), "key-2");
  for (const char* wrong : {"", "sk-alice-123", "sk-alice-12345", "alice", "alice:sk-alice-1234"}) {
    EXPECT_EQ(keys->Identify(wrong), std::nullopt) << wrong;
  }
  EXPECT_FALSE(ApiKeys::Parse("short").ok());
  EXPECT_FALSE(ApiKeys::Parse("# nothing\n").ok());
  EXPECT_FALSE(ApiKeys().required());
}

TEST(ApiKeys, KeyFromHeader) {
  EXPECT_EQ(KeyFromAuthorization("Bearer abc"), "abc");
  EXPECT_EQ(KeyFromAuthorization("bearer  abc "), "abc");
  EXPECT_EQ(KeyFromAuthorization("Basic dXNlcjpzZWNyZXQ="), "secret");
  for (const char* none : {"", "Bearer", "Digest abc", "Basic ???", "Basic dXNlcg=="}) {
    EXPECT_EQ(KeyFromAuthorization(none), "") << none;
  }
}

TEST(ClientLimiter, RateAndConcurrency) {
  ClientLimiter limiter({.requests_per_minute = 60, .concurrent = 3});
  const Clock::time_point start{};
  for (int i = 0; i < 3; ++i) EXPECT_EQ(limiter.Begin("a", start), std::nullopt);
  EXPECT_TRUE(limiter.Begin("a", start).has_value());  // three at once
  EXPECT_EQ(limiter.Begin("b", start), std::nullopt);  // another client's business
  int admitted = 0;
  for (int i = 0; i < 100; ++i) {
    limiter.End("a");
    if (!limiter.Begin("a", start).has_value()) ++admitted;
  }
  EXPECT_EQ(admitted, 7);  // a burst of ten, three of them above
  limiter.End("a");
  EXPECT_EQ(limiter.Begin("a", start), 1);  // one a second
  EXPECT_EQ(limiter.Begin("a", start + seconds(1)), std::nullopt);
}

}  // namespace
}  // namespace shoal
