#include "launcher/demo_model.h"

#include <fstream>
#include <iterator>
#include <string>

#include "gmock/gmock.h"

namespace shoal {
namespace {

std::string ReadAll(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

TEST(DemoModelTest, EmbeddedBytesAreTheFileOfTheProject) {
  const std::string file = ReadAll("deploy/demo_model/demo-q8_0.gguf");
  ASSERT_GT(file.size(), 3'000'000u);
  EXPECT_TRUE(DemoModelBytes() == file);
}

TEST(DemoModelTest, PathHoldsTheModelAndCallsAreIndependent) {
  absl::StatusOr<std::string> first = DemoModelPath();
  absl::StatusOr<std::string> second = DemoModelPath();
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_NE(*first, *second);
  EXPECT_TRUE(ReadAll(*first) == DemoModelBytes());
  EXPECT_TRUE(ReadAll(*first) == DemoModelBytes());  // opening again starts at the beginning
}

}  // namespace
}  // namespace shoal
