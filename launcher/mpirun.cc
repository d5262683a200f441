#include "launcher/mpirun.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "launcher/exit_code.h"

namespace shoal {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kEndByItself = std::chrono::seconds(3);  // after a loss; the ranks end in one second
constexpr auto kEndOnTerm = std::chrono::seconds(3);    // then SIGKILL
constexpr auto kSecondInterrupt = std::chrono::seconds(2);
constexpr auto kDrain = std::chrono::milliseconds(500);  // of stderr, after mpirun's end

void WriteAll(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;
    bytes.remove_prefix(n);
  }
}

std::vector<pid_t> ChildrenOf(pid_t pid) {
  std::vector<pid_t> children;
  const std::string tasks = absl::StrCat("/proc/", pid, "/task");
  DIR* const directory = opendir(tasks.c_str());
  if (directory == nullptr) return children;
  while (const dirent* entry = readdir(directory)) {
    if (entry->d_name[0] == '.') continue;
    std::ifstream file(absl::StrCat(tasks, "/", entry->d_name, "/children"));
    pid_t child;
    while (file >> child) children.push_back(child);
  }
  closedir(directory);
  return children;
}

void AddDescendants(pid_t pid, std::vector<pid_t>* out) {
  for (const pid_t child : ChildrenOf(pid)) {
    out->push_back(child);
    AddDescendants(child, out);
  }
}

// This process's descendant that is rank 0; -1 when there is none (yet).
pid_t FindRank0() {
  std::vector<pid_t> all;
  AddDescendants(getpid(), &all);
  for (const pid_t pid : all) {
    std::ifstream file(absl::StrCat("/proc/", pid, "/environ"), std::ios::binary);
    const std::string environment((std::istreambuf_iterator<char>(file)), {});
    // A variable stands between zero bytes.
    const std::string wanted("\0OMPI_COMM_WORLD_RANK=0\0", 24);
    if (environment.find(wanted) != std::string::npos) return pid;
  }
  return -1;
}

// The supervised mpirun. Descendants that lose their parent become this process's children (it is
// made their "subreaper"), so none can be missed.
class Mpirun {
 public:
  explicit Mpirun(absl::Duration start)
      : start_(start), start_deadline_(Clock::now() + absl::ToChronoNanoseconds(start)) {}
  absl::Status Start(const std::vector<std::string>& arguments);
  // Until mpirun has ended and its stderr is drained.
  void Supervise();
  // Kills and reaps what is left. Restores the caller's signals.
  void CleanUp();
  int ExitCode();

 private:
  void HandleSignal();
  void Terminate();
  void CheckDeadlines();
  void ReadStderr();
  void RelayStdin();
  void ReapChildren();
  int PollTimeout() const;

  const absl::Duration start_;
  const Clock::time_point start_deadline_;
  bool start_failed_ = false;
  pid_t pid_ = -1;
  int stderr_ = -1;
  int signals_ = -1;
  int stdin_relay_ = -1;  // write end of rank 0's stdin, when this process's is a terminal
  sigset_t old_signals_;
  MpirunNoise noise_;
  std::optional<int> wait_status_;
  std::optional<Clock::time_point> end_;  // SIGTERM (or SIGKILL) to mpirun then
  bool terminated_ = false;
  std::optional<Clock::time_point> interrupted_;
  std::optional<Clock::time_point> drained_;  // stop reading stderr then
  int ended_by_ = 0;                          // the signal that the user sent
};

absl::Status Mpirun::Start(const std::vector<std::string>& arguments) {
  sigset_t wanted;
  sigemptyset(&wanted);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGCHLD}) sigaddset(&wanted, signal);
  sigprocmask(SIG_BLOCK, &wanted, &old_signals_);
  signals_ = signalfd(-1, &wanted, SFD_CLOEXEC | SFD_NONBLOCK);
  prctl(PR_SET_CHILD_SUBREAPER, 1);

  int error_pipe[2], input_pipe[2] = {-1, -1}, exec_pipe[2];
  // A background process group may not read the terminal, so its bytes are passed on.
  const bool relay = isatty(STDIN_FILENO) != 0;
  if (signals_ < 0 || pipe2(error_pipe, O_CLOEXEC) != 0 || pipe2(exec_pipe, O_CLOEXEC) != 0 ||
      (relay && pipe2(input_pipe, O_CLOEXEC) != 0)) {
    return absl::ErrnoToStatus(errno, "cannot start mpirun");
  }
  std::vector<char*> argv;
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);

  const pid_t parent = getpid();
  pid_ = fork();
  if (pid_ < 0) return absl::ErrnoToStatus(errno, "cannot start mpirun");
  if (pid_ == 0) {
    setpgid(0, 0);  // the terminal's Ctrl-C is this program's to handle
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) _exit(kExitUnavailable);
    sigprocmask(SIG_SETMASK, &old_signals_, nullptr);
    if (relay) dup2(input_pipe[0], STDIN_FILENO);
    dup2(error_pipe[1], STDERR_FILENO);
    execvp(argv[0], argv.data());
    const int error = errno;
    WriteAll(exec_pipe[1], {reinterpret_cast<const char*>(&error), sizeof error});
    _exit(kExitUnavailable);
  }
  setpgid(pid_, pid_);
  close(error_pipe[1]);
  close(exec_pipe[1]);
  if (relay) close(input_pipe[0]);
  stderr_ = error_pipe[0];
  stdin_relay_ = input_pipe[1];
  if (relay) fcntl(stdin_relay_, F_SETFL, O_NONBLOCK);
  int error = 0;
  const bool failed = read(exec_pipe[0], &error, sizeof error) == sizeof error;
  close(exec_pipe[0]);
  if (!failed) return absl::OkStatus();
  if (error == ENOENT) {
    return absl::UnavailableError(
        "mpirun is not installed, and more than one rank needs it: apt-get install openmpi-bin "
        "(on every host), or use one rank");
  }
  return absl::UnavailableError(absl::StrCat("cannot start mpirun: ", std::strerror(error)));
}

void Mpirun::Supervise() {
  while (stderr_ >= 0 || !wait_status_.has_value()) {
    pollfd polls[] = {{signals_, POLLIN, 0}, {stderr_, POLLIN, 0}, {-1, POLLIN, 0}};
    // A background job of a shell must not touch the terminal.
    if (stdin_relay_ >= 0 && tcgetpgrp(STDIN_FILENO) == getpgrp()) polls[2].fd = STDIN_FILENO;
    if (poll(polls, std::size(polls), PollTimeout()) < 0 && errno != EINTR) break;
    if (polls[0].revents != 0) HandleSignal();
    if (polls[1].revents != 0) ReadStderr();
    if (polls[2].revents != 0) RelayStdin();
    ReapChildren();
    CheckDeadlines();
  }
  WriteAll(STDERR_FILENO, noise_.Finish());
}

int Mpirun::PollTimeout() const {
  Clock::time_point next = Clock::now() + std::chrono::seconds(1);
  if (end_.has_value()) next = std::min(next, *end_);
  if (drained_.has_value()) next = std::min(next, *drained_);
  const auto left =
      std::chrono::duration_cast<std::chrono::milliseconds>(next - Clock::now()).count();
  return static_cast<int>(std::max<int64_t>(left + 1, 0));
}

void Mpirun::HandleSignal() {
  signalfd_siginfo info;
  while (read(signals_, &info, sizeof info) == sizeof info) {
    const int signal = static_cast<int>(info.ssi_signo);
    if (signal == SIGCHLD) continue;
    const Clock::time_point now = Clock::now();
    if (signal == SIGINT) {
      const bool again = interrupted_.has_value() && now - *interrupted_ < kSecondInterrupt;
      interrupted_ = now;
      const pid_t rank0 = again ? -1 : FindRank0();
      if (rank0 > 0) {
        kill(rank0, SIGINT);
        continue;
      }
    }
    ended_by_ = signal;
    Terminate();
  }
}

// Asks once, then forces.
void Mpirun::Terminate() {
  if (wait_status_.has_value()) return;
  kill(-pid_, terminated_ ? SIGKILL : SIGTERM);
  kill(-pid_, SIGCONT);
  terminated_ = true;
  end_ = Clock::now() + kEndOnTerm;
}

void Mpirun::CheckDeadlines() {
  if (noise_.loss().has_value() && !end_.has_value()) end_ = Clock::now() + kEndByItself;
  if (!noise_.started() && !end_.has_value() && Clock::now() >= start_deadline_) {
    start_failed_ = true;
    end_ = Clock::now();
  }
  if (end_.has_value() && Clock::now() >= *end_) Terminate();
  if (wait_status_.has_value() && stderr_ >= 0) {
    // A process that mpirun left behind may hold the pipe open.
    if (!drained_.has_value()) drained_ = Clock::now() + kDrain;
    if (Clock::now() < *drained_) return;
    close(stderr_);
    stderr_ = -1;
  }
}

void Mpirun::ReadStderr() {
  char bytes[16 * 1024];
  const ssize_t n = read(stderr_, bytes, sizeof bytes);
  if (n < 0 && errno == EINTR) return;
  if (n <= 0) {
    close(stderr_);
    stderr_ = -1;
    return;
  }
  WriteAll(STDERR_FILENO, noise_.Feed({bytes, static_cast<size_t>(n)}));
}

void Mpirun::RelayStdin() {
  // A terminal gives a line at a time, and the pipe holds many: when it is full, the rank is not
  // reading, and what is typed ahead of that is lost.
  char bytes[4096];
  const ssize_t n = read(STDIN_FILENO, bytes, sizeof bytes);
  if (n > 0) {
    WriteAll(stdin_relay_, {bytes, static_cast<size_t>(n)});
  } else if (n == 0 || errno != EINTR) {
    close(stdin_relay_);
    stdin_relay_ = -1;
  }
}

void Mpirun::ReapChildren() {
  int status;
  pid_t pid;
  while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
    if (pid == pid_) wait_status_ = status;
  }
}

void Mpirun::CleanUp() {
  for (int i = 0; i < 200; ++i) {  // two seconds
    ReapChildren();
    std::vector<pid_t> left;
    AddDescendants(getpid(), &left);
    if (left.empty()) break;
    for (const pid_t pid : left) kill(pid, SIGKILL);
    poll(nullptr, 0, 10);
  }
  if (stdin_relay_ >= 0) close(stdin_relay_);
  close(signals_);
  prctl(PR_SET_CHILD_SUBREAPER, 0);
  sigprocmask(SIG_SETMASK, &old_signals_, nullptr);
}

int Mpirun::ExitCode() {
  if (ended_by_ != 0) return ended_by_ == SIGINT ? kExitInterrupted : 128 + ended_by_;
  if (interrupted_.has_value() && noise_.signal() == SIGINT) return kExitInterrupted;
  if (const std::optional<std::string> loss = noise_.loss(); loss.has_value()) {
    WriteAll(STDERR_FILENO, absl::StrCat("shoal: ", *loss, "; the job ended. Start it again",
                                         " (without that host, if it does not come back)\n"));
    return kExitUnavailable;
  }
  if (!wait_status_.has_value()) return kExitUnavailable;
  if (WIFEXITED(*wait_status_) && WEXITSTATUS(*wait_status_) == 0) return kExitOk;
  if (noise_.exit_code().has_value()) return *noise_.exit_code();
  std::string what;
  if (start_failed_) {
    what =
        absl::StrCat("the ranks did not find each other within ", absl::FormatDuration(start_),
                     "; check that the hosts' firewalls let them talk, or choose another network "
                     "with --net. ");
  } else if (WIFEXITED(*wait_status_)) {
    what = absl::StrCat("mpirun could not run the ranks (exit code ", WEXITSTATUS(*wait_status_),
                        "): ");
  } else {
    what = absl::StrCat("mpirun was ended by signal ", WTERMSIG(*wait_status_), ". ");
  }
  absl::StrAppend(&what, noise_.Explanation());
  if (what.back() != '\n') what.back() = '\n';
  WriteAll(STDERR_FILENO, absl::StrCat("shoal: ", what));
  return kExitUnavailable;
}

}  // namespace

absl::StatusOr<int> RunMpirun(const std::vector<std::string>& arguments, absl::Duration start) {
  std::fflush(nullptr);
  Mpirun mpirun(start);
  absl::Status started = mpirun.Start(arguments);
  if (started.ok()) mpirun.Supervise();
  mpirun.CleanUp();
  if (!started.ok()) return started;
  return mpirun.ExitCode();
}

}  // namespace shoal
