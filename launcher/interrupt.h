// Ctrl-C as a flag that loops can ask, for as long as an Interrupt lives.
#pragma once

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
  // Readable while one is pending. A wait for input polls it too: a signal that comes just before
  // the wait, or on another thread, does not interrupt it.
  int fd() const { return wakeup_; }

 private:
  int wakeup_ = -1;
  struct sigaction previous_ {};
};

}  // namespace shoal
