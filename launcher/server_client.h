// A client of a running `shoal serve` (or any server that speaks OpenAI's API): one request, its
// answer as a stream of events.
#pragma once

#include <functional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace shoal {

struct ServerAddress {
  bool tls = false;
  std::string host;
  std::string port;
  std::string prefix;  // of every path; no slash at its end
  // http://host:port, https://host, http://[::1]:8080/some/path. kInvalidArgument with the usage
  // exit code.
  static absl::StatusOr<ServerAddress> Parse(std::string_view url);
};

class ServerClient {
 public:
  // key: sent as a bearer token; empty: none. ca_file: PEM, whom to trust for https besides the
  // system's authorities.
  ServerClient(ServerAddress address, std::string key, std::string ca_file)
      : address_(std::move(address)), key_(std::move(key)), ca_file_(std::move(ca_file)) {}

  // Posts JSON and gives each `data:` line of the answer to `on_event`, until [DONE]. `stop` is
  // asked a few times a second and ends the request, which the server takes as a cancellation
  // (kCancelled). Other errors carry the exit code of their kind and what the server said.
  absl::Status Stream(const std::string& path, const std::string& body,
                      const std::function<absl::Status(std::string_view data)>& on_event,
                      const std::function<bool()>& stop) const;

 private:
  const ServerAddress address_;
  const std::string key_;
  const std::string ca_file_;
};

}  // namespace shoal
