#include "launcher/read_input.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "launcher/exit_code.h"

namespace shoal {

absl::StatusOr<std::string> ReadInput(const std::string& path, const std::string& what) {
  const auto failed = [&](int error) {
    return absl::NotFoundError(
        absl::StrCat("cannot read ", what, " in ", path, ": ", std::strerror(error)));
  };
  const bool is_stdin = path == "-";
  const int fd = is_stdin ? STDIN_FILENO : open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return failed(errno);
  const absl::Cleanup closing = [&] {
    if (!is_stdin) close(fd);
  };
  std::string text;
  char piece[1 << 16];
  while (true) {
    const ssize_t got = read(fd, piece, sizeof piece);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return failed(errno);
    if (got == 0) return text;
    text.append(piece, static_cast<size_t>(got));
    if (text.size() > kMaxInputBytes) {
      return UsageError(
          absl::StrCat(path, " has more than ", kMaxInputBytes, " bytes; no more are read"));
    }
  }
}

}  // namespace shoal
