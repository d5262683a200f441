// A line on the terminal that says how far long work is. Nothing is drawn elsewhere.
#pragma once

#include <cstdint>
#include <string>

namespace shoal {

// One thread at a time. The line is wiped when the bar goes.
class ProgressBar {
 public:
  // what: "loading", "packing"
  ProgressBar(std::string what, bool enabled);
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  void Show(int64_t done, int64_t total);

 private:
  const std::string what_;
  const bool enabled_;
  double begin_s_ = 0;
  int64_t begin_bytes_ = -1;
  int last_ = -1;
};

}  // namespace shoal
