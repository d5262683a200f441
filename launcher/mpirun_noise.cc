// Which lines of mpirun's stderr are its own, and what they tell.
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "launcher/mpirun.h"

namespace shoal {
namespace {

constexpr size_t kDashes = 50;       // mpirun draws 74
constexpr size_t kBlockLines = 100;  // a longer one is not mpirun's
constexpr size_t kLine = 4096;
constexpr size_t kNotices = 64 * 1024;
constexpr size_t kSaid = 64;
constexpr std::string_view kShoal = "shoal: ";
constexpr std::string_view kStarted = "shoal: all ranks are up";

bool IsRule(std::string_view line) {
  return line.size() >= kDashes && line.find_first_not_of('-') == std::string_view::npos;
}

bool StartsWith(std::string_view text, std::string_view prefix) {
  return text.substr(0, prefix.size()) == prefix;
}

// "[host:123] ..." as Open MPI's processes begin their lines. A host's name holds a letter, a time
// of day does not.
bool IsTagged(std::string_view line) {
  const size_t close = line.find(']'), colon = line.rfind(':', close);
  if (line.empty() || line[0] != '[' || close == std::string_view::npos ||
      colon == std::string_view::npos) {
    return false;
  }
  const std::string_view host = line.substr(1, colon - 1);
  const std::string_view pid = line.substr(colon + 1, close - colon - 1);
  const auto digit = [](unsigned char c) { return std::isdigit(c) != 0; };
  const auto alpha = [](unsigned char c) { return std::isalpha(c) != 0; };
  const auto name = [](unsigned char c) {
    return std::isalnum(c) != 0 || c == '.' || c == '-' || c == '_' || c == ',' || c == '[';
  };
  return !pid.empty() && std::all_of(pid.begin(), pid.end(), digit) &&
         std::any_of(host.begin(), host.end(), alpha) &&
         std::all_of(host.begin(), host.end(), name);
}

// "2 total processes killed (some possibly by mpirun during cleanup)"
bool IsTotal(std::string_view line) {
  const size_t space = line.find(' ');
  return space != 0 && space != std::string_view::npos &&
         std::all_of(line.begin(), line.begin() + space,
                     [](unsigned char c) { return std::isdigit(c); }) &&
         StartsWith(line.substr(space), " total process");
}

// The word after `key`.
std::string_view WordAfter(std::string_view text, std::string_view key) {
  const size_t at = text.find(key);
  if (at == std::string_view::npos) return {};
  const std::string_view rest = text.substr(at + key.size());
  return rest.substr(0, rest.find_first_of(" \n"));
}

}  // namespace

// Whether the start of a line leaves it open.
bool MpirunNoise::MayBeNotice(std::string_view line) const {
  if (line.size() > kLine || line.find('\r') != std::string_view::npos) return false;
  if (in_block_ || line.empty()) return true;
  const auto open = [&](std::string_view prefix) {
    return StartsWith(line, prefix) || StartsWith(prefix, line);
  };
  if (open(kShoal) || open("mpirun")) return true;
  if (line[0] == '-') return line.find_first_not_of('-') == std::string_view::npos;
  if (line[0] == '[') return line.find(']') == std::string_view::npos || IsTagged(line);
  const size_t digits = line.find_first_not_of("0123456789");
  if (digits == 0) return false;
  return digits == std::string_view::npos ? digits < 8 || line.size() < 8
                                          : StartsWith(" total process", line.substr(digits)) ||
                                                StartsWith(line.substr(digits), " total process");
}

std::string MpirunNoise::Feed(std::string_view bytes) {
  std::string out;
  while (!bytes.empty()) {
    const size_t end = bytes.find('\n');
    const std::string_view piece =
        bytes.substr(0, end == std::string_view::npos ? bytes.size() : end + 1);
    bytes.remove_prefix(piece.size());
    const bool whole = piece.back() == '\n';
    if (passing_) {
      out.append(piece);
      passing_ = !whole;
      continue;
    }
    line_.append(piece);
    if (whole) {
      const std::string line = std::move(line_);
      line_.clear();
      TakeLine(std::string_view(line).substr(0, line.size() - 1), &out);
    } else if (!MayBeNotice(line_)) {
      out.append(line_);
      line_.clear();
      passing_ = true;
    }
  }
  return out;
}

std::string MpirunNoise::Finish() {
  std::string out;
  if (!line_.empty()) TakeLine(std::exchange(line_, {}), &out);
  if (in_block_) EndBlock();
  return out;
}

void MpirunNoise::TakeLine(std::string_view line, std::string* out) {
  if (StartsWith(line, "shoal: rank ") &&
      absl::StrContains(absl::string_view(line.data(), line.size()), " was lost: ")) {
    if (rank_loss_.empty()) rank_loss_ = line.substr(kShoal.size());
    return;
  }
  if (line == kStarted) {
    started_ = true;
    return;
  }
  if (IsRule(line)) {
    if (in_block_) {
      EndBlock();
    } else {
      in_block_ = true;
    }
    return;
  }
  if (in_block_) {
    block_.emplace_back(line);
    if (block_.size() < kBlockLines) return;
    for (const std::string& text : block_) absl::StrAppend(out, text, "\n");
    block_.clear();
    in_block_ = false;
    return;
  }
  if (IsTagged(line) || IsTotal(line) || StartsWith(line, "mpirun: ") ||
      StartsWith(line, "mpirun noticed ")) {
    TakeNotice(line);
    return;
  }
  // After a loss the survivors have nothing to say but its consequences.
  if (loss().has_value()) return;
  if (StartsWith(line, kShoal)) {
    if (std::find(said_.begin(), said_.end(), line) != said_.end()) return;
    if (said_.size() < kSaid) said_.emplace_back(line);
  }
  out->append(line);
  out->push_back('\n');
}

void MpirunNoise::EndBlock() {
  std::string text;
  for (const std::string& line : block_) absl::StrAppend(&text, text.empty() ? "" : " ", line);
  const std::vector<std::string> block = std::exchange(block_, {});
  in_block_ = false;
  // mpirun noticed that process rank 1 with PID 0 on node b exited on signal 9 (Killed).
  const std::string_view rank = WordAfter(text, "process rank "),
                         node = WordAfter(text, " on node ");
  const std::string_view signal = WordAfter(text, " exited on signal ");
  int number = 0;
  if (signal_loss_.empty() && !rank.empty() &&
      absl::SimpleAtoi(absl::string_view(signal.data(), signal.size()), &number)) {
    const size_t at =
        text.find(" exited on signal ") + std::string_view(" exited on signal ").size();
    std::string what = text.substr(at);
    while (!what.empty() && (what.back() == '.' || what.back() == ' ')) what.pop_back();
    signal_ = number;
    signal_loss_ = absl::StrCat("rank ", std::string(rank), " on host ", std::string(node),
                                " was lost: killed by signal ", what);
    return;
  }
  // The first process to do so was: Process name: [[23044,1],0] Exit code: 66
  const size_t code = text.find("Exit code:");
  if (code != std::string::npos && text.find("exited with non-zero status") != std::string::npos) {
    const size_t digits = text.find_first_of("0123456789", code);
    const std::string_view word =
        digits == std::string::npos
            ? std::string_view()
            : std::string_view(text).substr(digits, text.find_first_of(" \n", digits) - digits);
    if (absl::SimpleAtoi(absl::string_view(word.data(), word.size()), &number)) exit_code_ = number;
  }
  for (const std::string& line : block) TakeNotice(line);
}

void MpirunNoise::TakeNotice(std::string_view line) {
  if (notices_.size() + line.size() < kNotices) absl::StrAppend(&notices_, std::string(line), "\n");
}

std::string MpirunNoise::Explanation() const {
  const auto says = [&](std::string_view what) { return notices_.find(what) != std::string::npos; };
  if (says("unable to reliably start one or more daemons")) {
    return "a host could not be reached. `ssh HOST true` must work from here without a password, "
           "and Open "
           "MPI must be installed on every host (apt-get install openmpi-bin)\n";
  }
  if (says("could not access\nor execute an executable") || says("unable to find the specified")) {
    return "a host does not have this program. Install shoal at the same path on every host\n";
  }
  if (says("could not be resolved") || says("Unknown host") || says("unknown host")) {
    return absl::StrCat("a host's name is unknown; check --host or the host file. mpirun says:\n",
                        notices_);
  }
  return notices_.empty() ? "" : absl::StrCat("mpirun says:\n", notices_);
}

void AnnounceStart() {
  const std::string line = absl::StrCat(std::string(kStarted), "\n");
  // Lost only when stderr is closed, and then nobody listens.
  if (write(STDERR_FILENO, line.data(), line.size()) < 0) return;
}

// A signal that mpirun noticed is the first thing that happened, and a survivor may only have seen
// what mpirun did about it. A stopped rank or a dead host, only the survivors see.
std::optional<std::string> MpirunNoise::loss() const {
  if (!signal_loss_.empty()) return signal_loss_;
  if (!rank_loss_.empty()) return rank_loss_;
  return std::nullopt;
}

}  // namespace shoal
