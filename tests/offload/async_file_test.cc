#include "offload/async_file.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/buffer.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;

std::string TempFile(const std::string& name) { return testing::TempDir() + "/" + name; }

Buffer Pattern(int64_t bytes) {
  Buffer buffer = *Buffer::Allocate(std::max<int64_t>(bytes, 2 << 20));
  for (int64_t i = 0; i < bytes / 8; i++) buffer.as<uint64_t>()[i] = i * 0x9E3779B97F4A7C15u;
  return buffer;
}

class AsyncFileTest : public testing::TestWithParam<IoEngine> {
 protected:
  AsyncFile::Options Options(bool write) {
    AsyncFile::Options o;
    o.engine = GetParam();
    o.write = o.create = write;
    return o;
  }
};

TEST_P(AsyncFileTest, ReadsBackWhatItWrote) {
  const std::string path = TempFile("async_rw.bin");
  const int64_t bytes = 5 * kIoPieceBytes + 3 * kIoAlignment;
  Buffer source = Pattern(bytes);
  {
    auto file = AsyncFile::Open(path, Options(true));
    ASSERT_TRUE(file.ok()) << file.status();
    ASSERT_TRUE((*file)->Transfer(true, 0, source.data(), bytes).ok());
    ASSERT_TRUE((*file)->Sync().ok());
  }
  auto file = AsyncFile::Open(path, Options(false));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->size(), bytes);
  Buffer back = *Buffer::Allocate(8 << 20);
  (*file)->Register(back.data(), back.size());
  ASSERT_TRUE((*file)->Transfer(false, 0, back.data(), bytes, 16).ok());
  EXPECT_EQ(memcmp(source.data(), back.data(), bytes), 0);
  std::filesystem::remove(path);
}

TEST_P(AsyncFileTest, CutFileIsDataLossThatNamesThePlace) {
  const std::string path = TempFile("async_cut.bin");
  Buffer source = Pattern(kIoPieceBytes);
  {
    auto file = AsyncFile::Open(path, Options(true));
    ASSERT_TRUE((*file)->Transfer(true, 0, source.data(), kIoPieceBytes).ok());
  }
  std::filesystem::resize_file(path, 300000);
  auto file = AsyncFile::Open(path, Options(false));
  absl::Status s = (*file)->Transfer(false, 0, source.data(), kIoPieceBytes);
  EXPECT_EQ(s.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(s.message()), HasSubstr("ends at byte 300000"));
  std::filesystem::remove(path);
}

TEST_P(AsyncFileTest, InjectedErrorFailsItsPieceAlone) {
  const std::string path = TempFile("async_fault.bin");
  Buffer source = Pattern(4 * kIoPieceBytes);
  AsyncFile::Options o = Options(true);
  {
    auto file = AsyncFile::Open(path, o);
    ASSERT_TRUE((*file)->Transfer(true, 0, source.data(), 4 * kIoPieceBytes).ok());
  }
  o = Options(false);
  o.fault = [](const IoPiece& p) { return p.offset == 2 * kIoPieceBytes ? EIO : 0; };
  auto file = AsyncFile::Open(path, o);
  for (int i = 0; i < 4; i++) {
    (*file)->Submit({false, i * kIoPieceBytes, source.data() + i * kIoPieceBytes, kIoPieceBytes,
                     static_cast<uint64_t>(i)});
  }
  std::vector<IoDone> done;
  while ((*file)->in_flight() > 0) (*file)->Wait(&done);
  ASSERT_EQ(done.size(), 4u);
  for (const IoDone& d : done) {
    EXPECT_EQ(d.status.ok(), d.tag != 2) << d.status;
    if (!d.status.ok()) {
      EXPECT_THAT(std::string(d.status.message()), HasSubstr("at byte 2097152"));
    }
  }
  std::filesystem::remove(path);
}

TEST_P(AsyncFileTest, OpenErrorsNameTheFile) {
  auto missing = AsyncFile::Open("/nonexistent/x.bin", Options(false));
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.status().message()), HasSubstr("/nonexistent/x.bin"));
  EXPECT_FALSE(AsyncFile::Open(testing::TempDir(), Options(false)).ok());
}

INSTANTIATE_TEST_SUITE_P(Engines, AsyncFileTest,
                         testing::Values(IoEngine::kAuto, IoEngine::kThreads),
                         [](const auto& info) {
                           return info.param == IoEngine::kThreads ? "threads" : "auto";
                         });

// Containers forbid io_uring with seccomp: the same as here.
TEST(IoUring, ForbiddenBySeccompFallsBackToThreads) {
  pid_t child = fork();
  if (child == 0) {
    sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    sock_fprog program = {std::size(filter), filter};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) _exit(2);
    AsyncFile::Options o;
    o.write = o.create = true;
    auto file = AsyncFile::Open(TempFile("async_seccomp.bin"), o);
    if (!file.ok()) _exit(3);
    Buffer source = Pattern(kIoPieceBytes);
    if (!(*file)->Transfer(true, 0, source.data(), kIoPieceBytes).ok()) _exit(4);
    if ((*file)->Describe().find("pread threads (io_uring refused: ") == std::string::npos)
      _exit(5);
    o.engine = IoEngine::kUring;
    if (AsyncFile::Open(TempFile("async_seccomp.bin"), o).ok()) _exit(6);
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  std::filesystem::remove(TempFile("async_seccomp.bin"));
}

// A disk that serves at most 8 pieces at once, and loses a little beyond that.
// For the thread sanitizer: the second thread's ring takes the place of the first one's in memory,
// and nothing but the queues themselves orders the two.
TEST(IoUring, RingInThePlaceOfAnotherThreadsRing) {
  int fd = open("/proc/self/exe", O_RDONLY);
  ASSERT_GE(fd, 0);
  Buffer back = *Buffer::Allocate(2 << 20);
  auto read = [&] {
    auto queue = MakeUringQueue(kIoDepthMax);
    if (absl::IsUnavailable(queue.status())) return;  // no rings here
    ASSERT_TRUE(queue.ok()) << queue.status();
    (*queue)->Push({false, fd, 0, back.data(), kIoAlignment, 7});
    std::vector<IoQueue::Result> done;
    (*queue)->Wait(&done);
    ASSERT_EQ(done.size(), 1u);
    EXPECT_EQ(done[0].result, kIoAlignment);
  };
  std::atomic<bool> closed = false;
  std::thread first([&] {
    read();
    closed.store(true, std::memory_order_relaxed);
  });
  std::thread second([&] {
    while (!closed.load(std::memory_order_relaxed)) std::this_thread::yield();
    read();
  });
  first.join();
  second.join();
  close(fd);
}

TEST(DepthTuner, SettlesOnTheDepthThatReadsFastest) {
  DepthTuner tuner;
  double now = 0;
  for (int i = 0; i < 2000 && !tuner.done(); i++) {
    double rate = 1e9 * std::min(tuner.depth(), 8) / 8 * (tuner.depth() > 8 ? 0.9 : 1);
    now += kIoPieceBytes / rate;
    tuner.OnBytes(kIoPieceBytes, true, now);
  }
  EXPECT_TRUE(tuner.done());
  EXPECT_EQ(tuner.depth(), 8);
}

TEST(DepthTuner, IdleStretchesDoNotCount) {
  DepthTuner tuner;
  for (int i = 0; i < 2000; i++) tuner.OnBytes(kIoPieceBytes, i % 10 != 0, i);
  EXPECT_FALSE(tuner.done());
}

}  // namespace
}  // namespace shoal
