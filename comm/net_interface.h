// Which network card the ranks of a job talk over.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace shoal {

struct NetInterface {
  std::string name;     // "eth0"
  std::string address;  // "192.0.2.7"
  std::string
      subnet;  // "192.0.2.0/24": names the same network on hosts that name the card otherwise
  bool is_loopback;
  bool is_virtual;  // a container bridge, a tunnel, a VPN: other hosts cannot be reached through
                    // it, or slowly
  bool is_default_route;
};

// Interfaces that are up and have an IPv4 address.
absl::StatusOr<std::vector<NetInterface>> ListInterfaces();

// `wanted` is a name, an address or a subnet as above; empty takes the one of the default route,
// then any that is neither loopback nor virtual. The error lists what there is.
absl::StatusOr<NetInterface> ChooseInterface(const std::vector<NetInterface>& interfaces,
                                             std::string_view wanted);

// The interface from which this machine reaches the first of `hosts` (names or addresses) that is
// not this machine itself; nullopt when all are, or when none can be resolved.
std::optional<NetInterface> InterfaceTowards(const std::vector<NetInterface>& interfaces,
                                             const std::vector<std::string>& hosts);

// Whether a name or address is this machine's. Names that cannot be resolved are not.
bool IsThisMachine(const std::vector<NetInterface>& interfaces, const std::string& host);

}  // namespace shoal
