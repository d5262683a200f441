#include "comm/nccl_api.h"

#include <dlfcn.h>

#include <cstdlib>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace shoal::nccl {
namespace {

template <typename Function>
bool Find(void* library, const char* name, Function*& function, std::string& missing) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (function == nullptr && missing.empty()) missing = name;
  return function != nullptr;
}

std::string PathOf(const void* symbol, const std::string& otherwise) {
  Dl_info info;
  return dladdr(symbol, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : otherwise;
}

}  // namespace

std::string VersionText(int version) {
  return absl::StrCat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

absl::StatusOr<std::shared_ptr<const Api>> Load(const std::string& path) {
  const char* const named = std::getenv("SHOAL_NCCL");
  const std::string wanted = !path.empty() ? path : named != nullptr ? named : "libnccl.so.2";
  void* const library = dlopen(wanted.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return absl::UnavailableError(absl::StrCat("NCCL was not found: ", dlerror()));
  }
  auto api = std::make_shared<Api>();
  std::string missing;
  Find(library, "ncclGetVersion", api->get_version, missing);
  Find(library, "ncclGetUniqueId", api->get_unique_id, missing);
  Find(library, "ncclCommInitRankConfig", api->init_rank, missing);
  Find(library, "ncclCommGetAsyncError", api->get_async_error, missing);
  Find(library, "ncclCommDestroy", api->destroy, missing);
  Find(library, "ncclCommAbort", api->abort, missing);
  Find(library, "ncclGetErrorString", api->error_string, missing);
  Find(library, "ncclAllReduce", api->all_reduce, missing);
  Find(library, "ncclAllGather", api->all_gather, missing);
  Find(library, "ncclBroadcast", api->broadcast, missing);
  Find(library, "ncclSend", api->send, missing);
  Find(library, "ncclRecv", api->recv, missing);
  if (!missing.empty()) {
    return absl::UnavailableError(
        absl::StrCat(wanted, " has no ", missing, ": NCCL 2.18 or newer is needed"));
  }
  api->path = PathOf(reinterpret_cast<const void*>(api->get_version), wanted);
  if (api->get_version(&api->version) != kSuccess || api->version < kLeastVersion) {
    return absl::UnavailableError(absl::StrCat(api->path, " is NCCL ", VersionText(api->version),
                                               "; 2.18 or newer is needed"));
  }
  return api;
}

}  // namespace shoal::nccl
