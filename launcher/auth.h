// Who may ask, and how often.
#pragma once

#include <array>
#include <chrono>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "kernels/mutex.h"

namespace shoal {

// Immutable; thread-safe.
class ApiKeys {
 public:
  ApiKeys() = default;  // none needed
  // A file with one key on each line, optionally with a name in front ("alice:sk-..."); lines that
  // begin with # do not count. Keys have at least 8 characters.
  static absl::StatusOr<ApiKeys> Load(const std::string& path);
  static absl::StatusOr<ApiKeys> Parse(std::string_view text);

  bool required() const { return !keys_.empty(); }
  // The name of the client with this key ("key-1" for a key without one). Takes the same time
  // whatever the key.
  std::optional<std::string> Identify(std::string_view key) const;

 private:
  using Digest = std::array<unsigned char, 32>;
  static Digest Hash(std::string_view key);
  std::vector<std::pair<std::string, Digest>> keys_;
};

// The key in an Authorization header: "Bearer KEY", or the password of "Basic ..." (what a browser
// sends); empty: none.
std::string KeyFromAuthorization(std::string_view header);

struct ClientLimits {
  int requests_per_minute = 0;  // 0: no limit
  int concurrent = 0;           // 0: no limit
};

// Thread-safe; HTTP and gRPC share one.
class ClientLimiter {
 public:
  explicit ClientLimiter(ClientLimits limits) : limits_(limits) {}
  // Counts a request of this client; or says in how many seconds to try again.
  std::optional<int> Begin(const std::string& client, std::chrono::steady_clock::time_point now);
  // A request that Begin counted has ended.
  void End(const std::string& client);

 private:
  struct Client {
    double tokens = 0;  // of the token bucket
    std::chrono::steady_clock::time_point filled;
    int concurrent = 0;
  };
  const ClientLimits limits_;
  Mutex mu_;
  std::map<std::string, Client> clients_ ABSL_GUARDED_BY(mu_);  // as many as there are keys
};

}  // namespace shoal
