#include "launcher/log.h"

#include "fmt/format.h"
#include "launcher/json_text.h"
#include "spdlog/sinks/stdout_color_sinks.h"
#include "spdlog/spdlog.h"

namespace shoal {
namespace {

// spdlog's default logger is the process's one log; it is set up once, before threads start.
bool g_json = false;

void Write(spdlog::level::level_enum level, const std::string& message) {
  spdlog::log(level, "{}", g_json ? DumpJson(nlohmann::json(message)) : message);
}

}  // namespace

void ConfigureLog(bool json, bool quiet) {
  g_json = json;
  spdlog::set_default_logger(spdlog::stderr_color_mt("shoal"));
  spdlog::set_level(quiet ? spdlog::level::warn : spdlog::level::info);
  spdlog::set_pattern(json ? R"({"time":"%Y-%m-%dT%H:%M:%S.%eZ","level":"%l","message":%v})"
                           : "%Y-%m-%dT%H:%M:%S.%eZ %^%l%$ %v",
                      spdlog::pattern_time_type::utc);
}

void LogInfo(const std::string& message) { Write(spdlog::level::info, message); }
void LogWarning(const std::string& message) { Write(spdlog::level::warn, message); }

void LogRequest(const RequestLog& r) {
  if (!spdlog::should_log(spdlog::level::info)) return;
  if (!g_json) {
    spdlog::info("{} {} {} {} {:.3f}s client={}{}{}", r.id, r.method, r.path, r.status, r.seconds,
                 r.client, r.trace.empty() ? "" : " traceparent=", r.trace);
    return;
  }
  const nlohmann::json fields = {
      {"request", r.id},      {"method", r.method}, {"path", r.path},        {"status", r.status},
      {"seconds", r.seconds}, {"client", r.client}, {"traceparent", r.trace}};
  spdlog::info("{}", DumpJson(fields));
}

}  // namespace shoal
