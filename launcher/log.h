// The coordinator's log: one line each on stderr, with time and level, as text or JSON. Never give
// it a prompt, a generated text or a key.
#pragma once

#include <string>
#include <string_view>

namespace shoal {

void ConfigureLog(bool json, bool quiet);
void LogInfo(const std::string& message);
void LogWarning(const std::string& message);
// A finished request: what an access log holds.
struct RequestLog {
  std::string_view id;
  std::string_view method;
  std::string_view path;  // without the query
  std::string_view client;
  std::string_view trace;  // traceparent header, or empty
  int status = 0;
  double seconds = 0;
};
void LogRequest(const RequestLog& request);

}  // namespace shoal
