// The line editor on a pseudo terminal: signals that come when nobody waits for input yet.
#include "launcher/line_reader.h"

#include <gtest/gtest.h>
#include <pty.h>
#include <unistd.h>

#include <csignal>
#include <optional>
#include <string>
#include <string_view>
#include <thread>

#include "launcher/interrupt.h"

namespace shoal {
namespace {

class LineReaderTest : public ::testing::Test {
 protected:
  // libedit sends a signal that it caught on to its whole process group: here, this test alone.
  static void SetUpTestSuite() { setsid(); }

  void SetUp() override {
    int terminal = -1;
    if (openpty(&keyboard_, &terminal, nullptr, nullptr, nullptr) != 0)
      FAIL() << "this machine gives no pseudo terminals: mount -t devpts devpts /dev/pts";
    stdin_ = dup(STDIN_FILENO);
    dup2(terminal, STDIN_FILENO);
    close(terminal);
  }
  void TearDown() override {
    if (stdin_ < 0) return;
    dup2(stdin_, STDIN_FILENO);
    close(stdin_);
    close(keyboard_);
  }
  void Type(std::string_view text) const {
    ASSERT_EQ(write(keyboard_, text.data(), text.size()), static_cast<ssize_t>(text.size()));
  }

  int keyboard_ = -1, stdin_ = -1;
};

TEST_F(LineReaderTest, AnInterruptBeforeTheEditorReadsIsNotMissed) {
  Interrupt interrupt;
  LineReader reader(interrupt);
  std::raise(SIGINT);
  EXPECT_EQ(reader.Next(), std::nullopt);
  EXPECT_FALSE(interrupt.pending()) << "it was taken";
}

TEST_F(LineReaderTest, AnInterruptOnAnotherThreadIsNotMissed) {
  Interrupt interrupt;
  LineReader reader(interrupt);
  std::thread other([] { std::raise(SIGINT); });
  EXPECT_EQ(reader.Next(), std::nullopt);
  other.join();
}

TEST_F(LineReaderTest, BytesThatAreNoLettersAreLeftOut) {
  Interrupt interrupt;
  LineReader reader(interrupt);
  Type("f\xc3\xbc\xffr \xe6\x97\xa5\xe6 x\n");
  EXPECT_EQ(reader.Next(), "f\xc3\xbcr \xe6\x97\xa5 x");
}

}  // namespace
}  // namespace shoal
