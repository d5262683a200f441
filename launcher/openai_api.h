// The HTTP routes: who may call them, and what they do.
#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "boost/asio/io_context.hpp"
#include "boost/asio/thread_pool.hpp"
#include "launcher/auth.h"
#include "launcher/coordinator.h"
#include "launcher/http_server.h"
#include "launcher/metrics.h"
#include "launcher/openai_request.h"
#include "launcher/supervisor.h"

namespace shoal {

struct ApiOptions {
  ApiKeys keys;
  bool loopback = true;                    // only names of this machine may stand in Host
  std::vector<std::string> allowed_hosts;  // further names for Host
  std::vector<std::string> cors_origins;   // "*": any; empty: no cross-origin page may read answers
};

// The coordinator's thread, but for the parsing of requests, which runs on a small pool.
class OpenAiApi : public HttpHandler {
 public:
  // Everything must outlive the object, and the object the last connection.
  OpenAiApi(boost::asio::io_context& io, ApiOptions options, const ModelContext& model,
            ClientLimiter& limiter, Coordinator& coordinator, const Supervisor& supervisor,
            Metrics& metrics);
  ~OpenAiApi() override;

  std::optional<HttpAnswer> OnHeaders(const HttpRequest& request) override;
  void OnRequest(std::shared_ptr<HttpExchange> exchange) override;
  HttpAnswer OnBadRequest(int status, const std::string& message) override;

  // What /status and the page show, as JSON.
  std::string StatusJson() const;

 private:
  using Exchange = std::shared_ptr<HttpExchange>;
  struct Route {
    const char* method;
    bool open = false;       // needs no key
    bool generates = false;  // counts against limits and needs the engine
    void (OpenAiApi::*handle)(const Exchange&) = nullptr;
  };
  static const std::map<std::string, Route, std::less<>>& Routes();

  std::optional<HttpAnswer> CheckOrigin(const HttpRequest& request) const;
  std::optional<std::string> ClientOf(const HttpRequest& request) const;
  void AddCors(const HttpRequest& request, HttpAnswer* answer) const;
  void Answer(const Exchange& exchange, HttpAnswer answer) const;
  template <typename Parsed>
  void Parse(const Exchange& exchange,
             absl::StatusOr<Parsed> (*parse)(std::string_view, const ModelContext&),
             std::function<void(absl::StatusOr<Parsed>)> then);
  // A request that counts against its key's limits.
  struct Counted {
    std::string client;
    std::string id;
    std::function<void(int status)> done;  // to be called once
  };
  // nullopt: refused, and answered.
  std::optional<Counted> Count(const Exchange& exchange);
  void Complete(const Exchange& exchange,
                absl::StatusOr<OpenAiRequest> (*parse)(std::string_view, const ModelContext&));

  void ChatCompletions(const Exchange& exchange);
  void Completions(const Exchange& exchange);
  void Embeddings(const Exchange& exchange);
  void Models(const Exchange& exchange);
  void Tokenize(const Exchange& exchange);
  void Detokenize(const Exchange& exchange);
  void Live(const Exchange& exchange);
  void Ready(const Exchange& exchange);
  void MetricsText(const Exchange& exchange);
  void Status(const Exchange& exchange);
  void Page(const Exchange& exchange);

  boost::asio::io_context& io_;
  const ApiOptions options_;
  const ModelContext& model_;
  Coordinator& coordinator_;
  const Supervisor& supervisor_;
  Metrics& metrics_;
  ClientLimiter& limiter_;
  std::string id_prefix_;  // of this process's request ids
  uint64_t next_id_ = 1;
  boost::asio::thread_pool pool_;  // last: its tasks use the rest
};

}  // namespace shoal
