// The part of NCCL that shoal calls, found at run time: a binary that was built without NCCL's
// headers uses it where it is installed, and starts where it is not.
//
// Declarations follow nccl.h of NCCL 2.18 (docs.nvidia.com/deeplearning/nccl, "NCCL API"); a test
// compares them with the installed header. Later versions accept this version's configuration.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace shoal::nccl {

using Result = int;
inline constexpr Result kSuccess = 0, kInProgress = 7;
inline constexpr int kInt8 = 0, kFloat32 = 7;  // ncclDataType_t
inline constexpr int kSum = 0;                 // ncclRedOp_t
inline constexpr int kLeastVersion = 21800;    // ncclCommInitRankConfig with all that Config holds

struct Comm;  // ncclComm_t points at it
struct UniqueId {
  char bytes[128];
};
struct Config {
  size_t size = sizeof(Config);
  unsigned magic = 0xcafebeef;
  unsigned version = kLeastVersion;
  int blocking = INT_MIN;  // INT_MIN: NCCL's default
  int cga_cluster_size = INT_MIN;
  int min_ctas = INT_MIN, max_ctas = INT_MIN;
  const char* net_name = nullptr;
  int split_share = INT_MIN;
};
static_assert(sizeof(Config) == 48);

using Stream = void*;  // cudaStream_t

// One loaded library. Any thread may use it; a Comm belongs to one thread at a time.
struct Api {
  Result (*get_version)(int* version);
  Result (*get_unique_id)(UniqueId* id);
  Result (*init_rank)(Comm** comm, int ranks, UniqueId id, int rank, Config* config);
  Result (*get_async_error)(Comm* comm, Result* error);
  Result (*destroy)(Comm* comm);
  Result (*abort)(Comm* comm);
  const char* (*error_string)(Result result);
  Result (*all_reduce)(const void* in, void* out, size_t count, int type, int op, Comm* comm,
                       Stream stream);
  Result (*all_gather)(const void* in, void* out, size_t count, int type, Comm* comm,
                       Stream stream);
  Result (*broadcast)(const void* in, void* out, size_t count, int type, int root, Comm* comm,
                      Stream stream);
  Result (*send)(const void* data, size_t count, int type, int peer, Comm* comm, Stream stream);
  Result (*recv)(void* data, size_t count, int type, int peer, Comm* comm, Stream stream);

  int version = 0;   // 22809 is 2.28.9
  std::string path;  // as the loader found it
};

// "2.28.9"
std::string VersionText(int version);

// Opens `path`, or SHOAL_NCCL, or libnccl.so.2 wherever the loader looks. kUnavailable says what
// was tried, and why an installed one is not used. It stays loaded until the process ends.
absl::StatusOr<std::shared_ptr<const Api>> Load(const std::string& path = "");

}  // namespace shoal::nccl
