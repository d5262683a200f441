// Checks in the test programs that run under mpirun: they print what failed and return an exit code
// of shoal's.
#pragma once

#include <cstdio>
#include <string>

#include "absl/status/status.h"

namespace shoal {

inline int ExitCode(const absl::Status& status) {
  if (status.ok()) return 1;  // a call worked that must not
  if (status.code() == absl::StatusCode::kDataLoss) return 65;
  return status.code() == absl::StatusCode::kUnavailable ? 69 : 1;
}

}  // namespace shoal

#define REQUIRE_OK(expr)                                                                          \
  do {                                                                                            \
    const absl::Status require_status = (expr);                                                   \
    if (!require_status.ok()) {                                                                   \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, require_status.ToString().c_str()); \
      return ExitCode(require_status);                                                            \
    }                                                                                             \
  } while (false)

#define REQUIRE(condition, text)                                              \
  do {                                                                        \
    if (!(condition)) {                                                       \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #condition, \
                   std::string(text).c_str());                                \
      return 1;                                                               \
    }                                                                         \
  } while (false)
