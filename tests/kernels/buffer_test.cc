#include "kernels/buffer.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "gtest/gtest.h"

namespace shoal {
namespace {

TEST(Buffer, IsZeroFilledAlignedAndExactlyAsLargeAsAsked) {
  for (const size_t bytes : {size_t{1}, size_t{4097}, (size_t{2} << 20) - 1, (size_t{2} << 20),
                             (size_t{5} << 20) + 123}) {
    absl::StatusOr<Buffer> buffer = Buffer::Allocate(bytes);
    ASSERT_TRUE(buffer.ok()) << buffer.status();
    EXPECT_EQ(buffer->size(), bytes);
    const size_t alignment = bytes >= (size_t{2} << 20) ? size_t{2} << 20 : 64;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->data()) % alignment, 0u) << bytes;
    EXPECT_TRUE(
        std::all_of(buffer->data(), buffer->data() + bytes, [](uint8_t b) { return b == 0; }));
    std::fill_n(buffer->data(), bytes, uint8_t{0xab});  // every byte is writable
  }
}

TEST(Buffer, EmptyHoldsNothing) {
  absl::StatusOr<Buffer> buffer = Buffer::Allocate(0);
  ASSERT_TRUE(buffer.ok());
  EXPECT_EQ(buffer->size(), 0u);
  EXPECT_EQ(buffer->data(), nullptr);
}

TEST(Buffer, MovesKeepTheBytesAndLeaveTheSourceEmpty) {
  Buffer a = Buffer::Allocate(3 << 20).value();
  a.data()[12345] = 7;
  Buffer b = std::move(a);
  EXPECT_EQ(a.data(), nullptr);
  EXPECT_EQ(a.size(), 0u);
  EXPECT_EQ(b.data()[12345], 7);
  a = std::move(b);
  EXPECT_EQ(a.data()[12345], 7);
  EXPECT_EQ(a.size(), size_t{3} << 20);
}

TEST(Buffer, RefusesWhatTheSystemCannotGiveAndNamesTheSize) {
  const absl::StatusOr<Buffer> buffer = Buffer::Allocate(size_t{1} << 60);
  ASSERT_FALSE(buffer.ok());
  EXPECT_EQ(buffer.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(buffer.status().message().find("1152921504606846976"), absl::string_view::npos);
}

}  // namespace
}  // namespace shoal
