#include "launcher/interrupt.h"

namespace shoal {
namespace {
std::atomic<bool> interrupted{false};
static_assert(std::atomic<bool>::is_always_lock_free);
void OnInterrupt(int) { interrupted.store(true); }
}  // namespace

Interrupt::Interrupt() {
  struct sigaction action {};
  action.sa_handler = OnInterrupt;
  sigaction(SIGINT, &action, &previous_);
}

Interrupt::~Interrupt() { sigaction(SIGINT, &previous_, nullptr); }

bool Interrupt::Take() { return interrupted.exchange(false); }

bool Interrupt::pending() const { return interrupted.load(); }

}  // namespace shoal
