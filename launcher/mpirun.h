// mpirun as a child of this process: its command line, its noise, its end.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace shoal {

struct MpirunJob {
  int ranks = 1;
  std::string hostfile;  // as mpirun's --hostfile and --host; both empty: this machine only
  std::string hosts;
  std::string net;  // network card, address or subnet; empty chooses
  std::vector<std::string> command;
};

// What the command line depends on besides the job.
struct MpirunHost {
  std::string program = "mpirun";  // its path, or a name that PATH leads to
  bool is_root = false;
  bool can_read_peers = true;  // process_vm_readv is allowed (containers often forbid it)
  std::string subnet;          // of the chosen network, "192.0.2.0/24"; empty: this machine only
  std::vector<std::string> environment;  // names to hand to the ranks
};

// The job's hosts and how many ranks mpirun should place on each.
struct HostPlan {
  std::vector<std::string> hosts;  // empty: this machine only
  std::vector<int> slots;          // ranks that each host takes
  // 0: mpirun obeys the slots that the user gave. Otherwise the ranks are spread evenly, in order.
  int ranks_per_host = 0;
};
absl::StatusOr<HostPlan> PlanHosts(const MpirunJob& job);

// argv, beginning with host.program.
std::vector<std::string> MpirunArguments(const MpirunJob& job, const MpirunHost& host,
                                         int ranks_per_host);

// Divides what comes out of mpirun's stderr into the ranks' own lines, passed on, and mpirun's
// notices, kept. A piece of a line that cannot become a notice passes at once, so progress bars and
// prompts move.
class MpirunNoise {
 public:
  // Returns what to pass on.
  std::string Feed(std::string_view bytes);
  std::string Finish();

  // "rank 1 on host b was lost: ...", from the surviving rank that saw it, or from mpirun's notice
  // of a signal.
  std::optional<std::string> loss() const;
  // The signal that ended the first rank, as mpirun tells.
  std::optional<int> signal() const { return signal_; }
  // The nonzero exit code with which the first rank ended by itself (and has said why).
  std::optional<int> exit_code() const { return exit_code_; }
  // All ranks have met (AnnounceStart).
  bool started() const { return started_; }
  // What mpirun's own notices mean, for when nothing else explains its failure; else the notices.
  std::string Explanation() const;

 private:
  bool MayBeNotice(std::string_view line) const;
  void TakeLine(std::string_view line, std::string* out);
  void TakeNotice(std::string_view line);
  void EndBlock();

  std::string line_;       // a line that may still turn out to be a notice
  bool passing_ = false;   // in the middle of a line that passes
  bool in_block_ = false;  // between two lines of dashes
  std::vector<std::string> block_;
  std::string notices_;
  std::string rank_loss_;    // as a rank told
  std::string signal_loss_;  // as mpirun told
  std::optional<int> signal_;
  std::optional<int> exit_code_;
  bool started_ = false;
  std::vector<std::string> said_;  // "shoal: " lines so far: every rank says the same
};

// Tells the RunMpirun above this rank that the job is running. For one of the ranks.
void AnnounceStart();

// Runs mpirun to its end and returns this process's exit code. stdin goes to rank 0, stdout passes
// unchanged. SIGINT goes to rank 0, which may finish in order; the next one, SIGTERM or SIGHUP end
// the job. A lost rank ends it within seconds, with one line on stderr. No process of the job on
// this machine outlives the call. REQUIRES: no other thread and no other child process.
absl::StatusOr<int> RunMpirun(const std::vector<std::string>& arguments,
                              absl::Duration start = absl::Seconds(60));

}  // namespace shoal
