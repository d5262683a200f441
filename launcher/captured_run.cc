#include "launcher/captured_run.h"

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <iterator>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

extern char** environ;

namespace shoal {
namespace {

constexpr size_t kMostBytes = 1 << 20;  // of each stream
constexpr absl::Duration kEndOnTerm = absl::Seconds(10);

// Appends what can be read; closes the pipe at its end. False when there is too much.
bool Read(int& fd, std::string& into) {
  char bytes[16 * 1024];
  const ssize_t n = read(fd, bytes, sizeof bytes);
  if (n < 0 && errno == EINTR) return true;
  if (n <= 0) {
    close(fd);
    fd = -1;
    return true;
  }
  into.append(bytes, n);
  return into.size() <= kMostBytes;
}

// Waits until `deadline`; false when the process is still there.
bool Reap(pid_t pid, absl::Time deadline, int* status) {
  while (waitpid(pid, status, WNOHANG) != pid) {
    if (absl::Now() >= deadline) return false;
    absl::SleepFor(absl::Milliseconds(5));
  }
  return true;
}

// Until both pipes are closed; false when that takes too long or too much is said.
bool Drain(int fds[2], CapturedRun& run, absl::Time deadline) {
  while (fds[0] >= 0 || fds[1] >= 0) {
    const int64_t left = absl::ToInt64Milliseconds(deadline - absl::Now());
    if (left <= 0) return false;
    pollfd polls[] = {{fds[0], POLLIN, 0}, {fds[1], POLLIN, 0}};
    if (poll(polls, std::size(polls), static_cast<int>(std::min<int64_t>(left, 1000))) < 0) {
      continue;  // interrupted
    }
    if (polls[0].revents != 0 && !Read(fds[0], run.out)) return false;
    if (polls[1].revents != 0 && !Read(fds[1], run.err)) return false;
  }
  return true;
}

}  // namespace

absl::StatusOr<CapturedRun> RunCaptured(const std::vector<std::string>& arguments,
                                        absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  int out[2], err[2];
  if (pipe2(out, O_CLOEXEC) != 0) return absl::ErrnoToStatus(errno, "cannot make a pipe");
  int fds[2] = {out[0], -1};  // what this side reads
  const auto close_ours = absl::MakeCleanup([&fds] {
    for (const int fd : fds) {
      if (fd >= 0) close(fd);
    }
  });
  if (pipe2(err, O_CLOEXEC) != 0) {
    close(out[1]);
    return absl::ErrnoToStatus(errno, "cannot make a pipe");
  }
  fds[1] = err[0];

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, err[1], STDERR_FILENO);
  std::vector<char*> argv;
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  pid_t pid = -1;
  const int error = posix_spawnp(&pid, argv[0], &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  close(out[1]);
  close(err[1]);
  if (error == ENOENT) return absl::NotFoundError(absl::StrCat(arguments[0], " was not found"));
  if (error != 0) return absl::ErrnoToStatus(error, absl::StrCat("cannot run ", arguments[0]));

  CapturedRun run;
  int status = 0;
  if (Drain(fds, run, deadline) && Reap(pid, deadline, &status)) {
    run.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return run;
  }
  kill(pid, SIGTERM);
  if (!Reap(pid, absl::Now() + kEndOnTerm, &status)) {
    kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
  }
  return absl::DeadlineExceededError(absl::StrCat(arguments[0], " was ended: it took longer than ",
                                                  absl::FormatDuration(timeout),
                                                  " or said too much"));
}

}  // namespace shoal
