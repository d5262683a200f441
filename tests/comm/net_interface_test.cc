#include "comm/net_interface.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace shoal {
namespace {

using ::testing::HasSubstr;

const std::vector<NetInterface> kCards = {
    {"lo", "127.0.0.1", "127.0.0.0/8", true, false, false},
    {"docker0", "172.17.0.1", "172.17.0.0/16", false, true, false},
    {"eth0", "10.0.0.7", "10.0.0.0/24", false, false, false},
    {"eth1", "192.0.2.7", "192.0.2.0/24", false, false, true},
};

TEST(NetInterface, TakesTheDefaultRouteThenAnyRealCard) {
  EXPECT_EQ(ChooseInterface(kCards, "")->name, "eth1");
  std::vector<NetInterface> no_default = kCards;
  no_default[3].is_default_route = false;
  EXPECT_EQ(ChooseInterface(no_default, "")->name, "eth0");
  // A VPN may hold the default route, and is still not where the ranks talk.
  no_default[1].is_default_route = true;
  EXPECT_EQ(ChooseInterface(no_default, "")->name, "eth0");
}

TEST(NetInterface, ObeysTheUserByNameAddressOrSubnet) {
  EXPECT_EQ(ChooseInterface(kCards, "eth0")->name, "eth0");
  EXPECT_EQ(ChooseInterface(kCards, "10.0.0.7")->name, "eth0");
  EXPECT_EQ(ChooseInterface(kCards, "10.0.0.0/24")->name, "eth0");
  EXPECT_EQ(ChooseInterface(kCards, "docker0")->name, "docker0");
}

TEST(NetInterface, TheErrorListsWhatThereIs) {
  const absl::Status unknown = ChooseInterface(kCards, "eth9").status();
  EXPECT_EQ(unknown.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(unknown.message()), HasSubstr("eth9"));
  EXPECT_THAT(std::string(unknown.message()), HasSubstr("eth1 (192.0.2.0/24)"));
  const absl::Status none = ChooseInterface({kCards[0], kCards[1]}, "").status();
  EXPECT_THAT(std::string(none.message()), HasSubstr("--net"));
}

TEST(NetInterface, HostsThatAreThisMachineNeedNoNetwork) {
  const auto interfaces = ListInterfaces();
  ASSERT_TRUE(interfaces.ok()) << interfaces.status();
  EXPECT_FALSE(InterfaceTowards(*interfaces, {"localhost", "127.0.0.1"}).has_value());
  for (const NetInterface& i : *interfaces) {
    EXPECT_FALSE(InterfaceTowards(*interfaces, {i.address}).has_value()) << i.address;
  }
}

TEST(NetInterface, KnowsItselfByAddressAndName) {
  const std::vector<NetInterface> interfaces = *ListInterfaces();
  EXPECT_TRUE(IsThisMachine(interfaces, "127.0.0.1"));
  EXPECT_TRUE(IsThisMachine(interfaces, "localhost"));
  for (const NetInterface& i : interfaces) EXPECT_TRUE(IsThisMachine(interfaces, i.address));
  EXPECT_FALSE(IsThisMachine(interfaces, "203.0.113.7")) << "no route to it, perhaps";
  EXPECT_FALSE(IsThisMachine(interfaces, "no-such-host.invalid"));
}

TEST(NetInterface, ThisMachineHasALoopback) {
  const auto interfaces = ListInterfaces();
  ASSERT_TRUE(interfaces.ok()) << interfaces.status();
  bool found = false;
  for (const NetInterface& i : *interfaces) {
    found |= i.is_loopback && i.address == "127.0.0.1" && i.subnet == "127.0.0.0/8";
  }
  EXPECT_TRUE(found);
}

}  // namespace
}  // namespace shoal
