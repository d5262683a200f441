#include "launcher/demo_model.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

extern "C" {
extern const char shoal_demo_model_begin[];
extern const char shoal_demo_model_end[];
}

namespace shoal {

std::string_view DemoModelBytes() {
  return {shoal_demo_model_begin,
          static_cast<size_t>(shoal_demo_model_end - shoal_demo_model_begin)};
}

absl::StatusOr<std::string> DemoModelPath() {
  // The descriptor stays open on purpose: the path lives as long as it does.
  const int fd = memfd_create("shoal-demo-model.gguf", MFD_CLOEXEC);
  if (fd < 0) {
    return absl::ErrnoToStatus(errno,
                               "no in-memory file for the demo model; name a model file with -m");
  }
  std::string_view rest = DemoModelBytes();
  while (!rest.empty()) {
    const ssize_t n = write(fd, rest.data(), rest.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      const int error = errno;
      close(fd);
      return absl::ErrnoToStatus(error, "writing the demo model to memory");
    }
    rest.remove_prefix(static_cast<size_t>(n));
  }
  return absl::StrCat("/proc/self/fd/", fd);
}

}  // namespace shoal
