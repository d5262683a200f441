#include "launcher/interrupt.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

#include "kernels/check.h"

namespace shoal {
namespace {

std::atomic<bool> interrupted{false};
std::atomic<int> wakeup{-1};
static_assert(std::atomic<bool>::is_always_lock_free && std::atomic<int>::is_always_lock_free);

void OnInterrupt(int) {
  const int error = errno;
  interrupted.store(true);
  eventfd_write(wakeup.load(), 1);
  errno = error;
}

}  // namespace

Interrupt::Interrupt() : wakeup_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  SHOAL_CHECK(wakeup_ >= 0, "a process may have one file more");
  interrupted.store(false);
  wakeup.store(wakeup_);
  struct sigaction action {};
  action.sa_handler = OnInterrupt;
  sigaction(SIGINT, &action, &previous_);
}

Interrupt::~Interrupt() {
  sigaction(SIGINT, &previous_, nullptr);
  wakeup.store(-1);
  close(wakeup_);
}

bool Interrupt::Take() {
  eventfd_t count = 0;
  eventfd_read(wakeup_, &count);
  return interrupted.exchange(false);
}

bool Interrupt::pending() const { return interrupted.load(); }

}  // namespace shoal
