#include "comm/net_interface.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <fstream>
#include <sstream>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace shoal {
namespace {

// Bridges and tunnels that carry a machine's own containers and virtual machines, or a VPN.
constexpr std::string_view kVirtualPrefixes[] = {"docker",  "br-",  "veth",   "virbr", "cni",
                                                 "flannel", "cali", "tun",    "tap",   "wg",
                                                 "vnet",    "lxc",  "podman", "ifb",   "tailscale"};

std::string DefaultRouteName() {
  std::ifstream routes("/proc/net/route");
  std::string line;
  std::getline(routes, line);  // the header
  while (std::getline(routes, line)) {
    std::istringstream fields(line);
    std::string name, destination;
    fields >> name >> destination;
    if (destination == "00000000") return name;
  }
  return "";
}

std::string AddressText(uint32_t host_order) {
  const in_addr address{htonl(host_order)};
  char text[INET_ADDRSTRLEN] = "";
  inet_ntop(AF_INET, &address, text, sizeof text);
  return text;
}

uint32_t AddressBits(const sockaddr* address) {
  return ntohl(reinterpret_cast<const sockaddr_in*>(address)->sin_addr.s_addr);
}

}  // namespace

absl::StatusOr<std::vector<NetInterface>> ListInterfaces() {
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return absl::ErrnoToStatus(errno, "cannot list network interfaces");
  const std::string default_name = DefaultRouteName();
  std::vector<NetInterface> interfaces;
  for (const ifaddrs* i = list; i != nullptr; i = i->ifa_next) {
    const bool up = (i->ifa_flags & (IFF_UP | IFF_RUNNING)) == (IFF_UP | IFF_RUNNING);
    if (!up || i->ifa_addr == nullptr || i->ifa_netmask == nullptr ||
        i->ifa_addr->sa_family != AF_INET) {
      continue;
    }
    const uint32_t address = AddressBits(i->ifa_addr), mask = AddressBits(i->ifa_netmask);
    const std::string name = i->ifa_name;
    const bool is_virtual =
        std::any_of(std::begin(kVirtualPrefixes), std::end(kVirtualPrefixes),
                    [&](std::string_view prefix) { return name.rfind(prefix, 0) == 0; });
    interfaces.push_back({name, AddressText(address),
                          absl::StrCat(AddressText(address & mask), "/", std::popcount(mask)),
                          (i->ifa_flags & IFF_LOOPBACK) != 0, is_virtual, name == default_name});
  }
  freeifaddrs(list);
  return interfaces;
}

absl::StatusOr<NetInterface> ChooseInterface(const std::vector<NetInterface>& interfaces,
                                             std::string_view wanted) {
  const auto find = [&](auto matches) -> const NetInterface* {
    const auto found = std::find_if(interfaces.begin(), interfaces.end(), matches);
    return found == interfaces.end() ? nullptr : &*found;
  };
  const NetInterface* chosen = nullptr;
  if (!wanted.empty()) {
    chosen = find([&](const NetInterface& i) {
      return i.name == wanted || i.address == wanted || i.subnet == wanted;
    });
  } else {
    const auto usable = [](const NetInterface& i) { return !i.is_loopback && !i.is_virtual; };
    chosen = find([&](const NetInterface& i) { return usable(i) && i.is_default_route; });
    if (chosen == nullptr) chosen = find(usable);
  }
  if (chosen != nullptr) return *chosen;
  const std::string list =
      absl::StrJoin(interfaces, ", ", [](std::string* out, const NetInterface& i) {
        absl::StrAppend(out, i.name, " (", i.subnet, ")");
      });
  if (wanted.empty()) {
    return absl::NotFoundError(absl::StrCat(
        "no network interface leads to other hosts (found: ", list, "); choose one with --net"));
  }
  return absl::NotFoundError(absl::StrCat(
      "this host has no network interface ", std::string(wanted),
      " that is up and has an IPv4 address; it has: ", list, "; give one of these with --net"));
}

std::optional<NetInterface> InterfaceTowards(const std::vector<NetInterface>& interfaces,
                                             const std::vector<std::string>& hosts) {
  for (const std::string& host : hosts) {
    addrinfo hints{};
    hints.ai_family = AF_INET;
    hints.ai_socktype = SOCK_DGRAM;
    addrinfo* found = nullptr;
    if (getaddrinfo(host.c_str(), "9", &hints, &found) != 0) continue;
    // Connecting a datagram socket sends nothing: it only asks the routing table for the own
    // address.
    sockaddr_in own{};
    socklen_t length = sizeof own;
    const int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    const bool routed = fd >= 0 && connect(fd, found->ai_addr, found->ai_addrlen) == 0 &&
                        getsockname(fd, reinterpret_cast<sockaddr*>(&own), &length) == 0;
    if (fd >= 0) close(fd);
    const std::string peer = AddressText(AddressBits(found->ai_addr));
    freeaddrinfo(found);
    if (!routed) continue;
    const std::string address = AddressText(AddressBits(reinterpret_cast<sockaddr*>(&own)));
    if (address == peer) continue;  // this machine
    for (const NetInterface& i : interfaces) {
      if (i.address == address && !i.is_loopback) return i;
    }
  }
  return std::nullopt;
}

bool IsThisMachine(const std::vector<NetInterface>& interfaces, const std::string& host) {
  addrinfo hints{};
  hints.ai_family = AF_INET;
  addrinfo* found = nullptr;
  if (getaddrinfo(host.c_str(), nullptr, &hints, &found) != 0) return false;
  const std::string address = AddressText(AddressBits(found->ai_addr));
  freeaddrinfo(found);
  if (address.rfind("127.", 0) == 0) return true;
  return std::any_of(interfaces.begin(), interfaces.end(),
                     [&](const NetInterface& i) { return i.address == address; });
}

}  // namespace shoal
