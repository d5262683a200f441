#include "comm/nccl_api.h"

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <type_traits>

#include "gmock/gmock.h"

#ifdef SHOAL_HAVE_NCCL_HEADER
#include <nccl.h>
#endif

namespace shoal::nccl {
namespace {

using ::testing::HasSubstr;

TEST(NcclApi, AMissingLibraryIsSaidInWords) {
  const auto api = Load("libno-such-nccl.so.2");
  ASSERT_FALSE(api.ok());
  EXPECT_EQ(api.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(api.status().message()), HasSubstr("NCCL was not found"));
  EXPECT_THAT(std::string(api.status().message()), HasSubstr("libno-such-nccl.so.2"));
}

TEST(NcclApi, ALibraryWithoutItsFunctionsIsRefused) {
  const auto api = Load("libm.so.6");
  ASSERT_FALSE(api.ok());
  EXPECT_THAT(std::string(api.status().message()), HasSubstr("has no ncclGetVersion"));
}

TEST(NcclApi, VersionsReadAsPeopleWriteThem) {
  EXPECT_EQ(VersionText(22809), "2.28.9");
  EXPECT_EQ(VersionText(21805), "2.18.5");
}

#ifdef SHOAL_HAVE_NCCL_HEADER

// The declarations are NCCL's own.
static_assert(sizeof(UniqueId) == sizeof(ncclUniqueId));
static_assert(kSuccess == ncclSuccess && kInProgress == ncclInProgress);
static_assert(kInt8 == ncclInt8 && kFloat32 == ncclFloat32 && kSum == ncclSum);
static_assert(offsetof(Config, size) == offsetof(ncclConfig_t, size) &&
              offsetof(Config, magic) == offsetof(ncclConfig_t, magic) &&
              offsetof(Config, version) == offsetof(ncclConfig_t, version) &&
              offsetof(Config, blocking) == offsetof(ncclConfig_t, blocking) &&
              offsetof(Config, cga_cluster_size) == offsetof(ncclConfig_t, cgaClusterSize) &&
              offsetof(Config, min_ctas) == offsetof(ncclConfig_t, minCTAs) &&
              offsetof(Config, max_ctas) == offsetof(ncclConfig_t, maxCTAs) &&
              offsetof(Config, net_name) == offsetof(ncclConfig_t, netName) &&
              offsetof(Config, split_share) == offsetof(ncclConfig_t, splitShare) &&
              sizeof(Config) <= sizeof(ncclConfig_t));

TEST(NcclApi, OurConfigurationIsWhatNcclInitializes) {
  const ncclConfig_t theirs = NCCL_CONFIG_INITIALIZER;
  const Config ours;
  EXPECT_EQ(ours.magic, theirs.magic);
  EXPECT_EQ(ours.blocking, theirs.blocking);
  EXPECT_EQ(ours.split_share, theirs.splitShare);
  EXPECT_EQ(ours.net_name, theirs.netName);
}

// The header's library: it needs a driver for more than its version.
TEST(NcclApi, TheInstalledLibraryLoadsAndSaysItsVersion) {
  if (std::getenv("SHOAL_NCCL") == nullptr) {
    // Where the loader does not look, the CUDA toolkit's own folder is tried.
    for (const char* path : {"libnccl.so.2", "/usr/local/cuda/lib/libnccl.so.2",
                             "/usr/local/cuda/lib64/libnccl.so.2"}) {
      if (const auto api = Load(path); api.ok()) {
        EXPECT_EQ((*api)->version, NCCL_VERSION_CODE) << (*api)->path;
        return;
      }
    }
  }
  const auto api = Load();
  ASSERT_TRUE(api.ok()) << api.status();
  EXPECT_GE((*api)->version, kLeastVersion);
}

#endif

}  // namespace
}  // namespace shoal::nccl
