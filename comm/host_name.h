// The name of this machine, as messages to people give it.
#pragma once

#include <unistd.h>

#include <string>

namespace shoal {

inline std::string HostName() {
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  return name[0] != '\0' ? name : "localhost";
}

}  // namespace shoal
