#include "launcher/exit_code.h"

#include <unistd.h>

#include <cstdio>
#include <new>
#include <string>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace shoal {
namespace {
constexpr char kPayload[] = "shoal/exit_code";

// Nothing here may allocate.
void OutOfMemory() {
  static constexpr char kMessage[] =
      "shoal: out of memory: the system gives this process no more. Less is taken with a smaller "
      "context (-c), KV cache (--kv-tokens) or batch (-b)\n";
  if (write(STDERR_FILENO, kMessage, sizeof kMessage - 1) < 0) _exit(kExitNoMemory);
  _exit(kExitNoMemory);
}
}  // namespace

absl::Status WithExitCode(absl::Status status, int code) {
  if (!status.ok()) status.SetPayload(kPayload, absl::Cord(absl::StrCat(code)));
  return status;
}

int ExitCodeOf(const absl::Status& status) {
  if (status.ok()) return kExitOk;
  if (const absl::optional<absl::Cord> payload = status.GetPayload(kPayload); payload.has_value()) {
    int code = 0;
    if (absl::SimpleAtoi(std::string(*payload), &code)) return code;
  }
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kDataLoss:
    case absl::StatusCode::kUnimplemented:
      return kExitMalformed;
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kFailedPrecondition:
      return kExitNoInput;
    case absl::StatusCode::kResourceExhausted:
      return kExitNoMemory;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
      return kExitUnavailable;
    case absl::StatusCode::kCancelled:
      return kExitInterrupted;
    default:
      return kExitInternal;
  }
}

absl::Status UsageError(const std::string& message) {
  return WithExitCode(absl::InvalidArgumentError(message), kExitUsage);
}

void ExitWhenOutOfMemory() { std::set_new_handler(OutOfMemory); }

int ReportError(const absl::Status& status) {
  if (status.ok()) return kExitOk;
  std::fprintf(stderr, "shoal: %s\n", std::string(status.message()).c_str());
  return ExitCodeOf(status);
}

}  // namespace shoal
