// A model's thoughts on a terminal: on stderr, as the answer alone is what stdout is for.
#pragma once

#include <cstdio>
#include <string_view>

namespace shoal {

class ThoughtPrinter {
 public:
  explicit ThoughtPrinter(bool quiet) : quiet_(quiet) {}
  void Print(std::string_view thought) {
    if (quiet_ || thought.empty()) return;
    if (!open_) std::fputs("(thinks) ", stderr);
    open_ = true;
    std::fwrite(thought.data(), 1, thought.size(), stderr);
  }
  // The answer follows, or nothing.
  void End() {
    if (open_) std::fputs("\n\n", stderr);
    open_ = false;
  }

 private:
  const bool quiet_;
  bool open_ = false;
};

}  // namespace shoal
