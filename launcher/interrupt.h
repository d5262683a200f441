// Ctrl-C as a flag that loops can ask, for as long as an Interrupt lives.
#pragma once

#include <atomic>
#include <csignal>

namespace shoal {

// At most one at a time: a signal handler has nowhere else to write than a global.
class Interrupt {
 public:
  Interrupt();
  ~Interrupt();
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;
  // True once after each Ctrl-C.
  bool Take();
  bool pending() const;

 private:
  struct sigaction previous_ {};
};

}  // namespace shoal
