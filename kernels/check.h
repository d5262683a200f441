// SHOAL_CHECK: aborts on a bug of our own. The world's faults (files, peers, users) are
// absl::Status instead.
#pragma once

namespace shoal::internal {
// Prints "file:line: check failed: condition: text" to stderr and aborts.
[[noreturn]] void CheckFailed(const char* file, int line, const char* condition, const char* text);
}  // namespace shoal::internal

// Always on. `text` says what the caller should have done.
#define SHOAL_CHECK(cond, text)                 \
  (__builtin_expect(static_cast<bool>(cond), 1) \
       ? static_cast<void>(0)                   \
       : ::shoal::internal::CheckFailed(__FILE__, __LINE__, #cond, text))
