#include "launcher/progress_bar.h"

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <utility>

namespace shoal {
namespace {

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

ProgressBar::ProgressBar(std::string what, bool enabled)
    : what_(std::move(what)), enabled_(enabled && isatty(STDERR_FILENO) != 0) {}

ProgressBar::~ProgressBar() {
  if (last_ >= 0) std::fprintf(stderr, "\r\033[K");
}

void ProgressBar::Show(int64_t done, int64_t total) {
  if (!enabled_) return;
  if (begin_bytes_ < 0) {
    begin_bytes_ = done;
    begin_s_ = Now();
  }
  const int percent = total > 0 ? static_cast<int>(done * 100 / total) : 100;
  if (percent == last_) return;
  last_ = percent;
  std::fprintf(stderr, "\r%s %3d %% of %.2f GB", what_.c_str(), percent,
               static_cast<double>(total) / 1e9);
  const double seconds = Now() - begin_s_;
  if (seconds < 1 || done <= begin_bytes_) return;
  const double rate = static_cast<double>(done - begin_bytes_) / seconds;
  std::fprintf(stderr, ", %.2f GB/s, %.0f s left ", rate / 1e9,
               static_cast<double>(total - done) / rate);
}

}  // namespace shoal
