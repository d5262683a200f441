#include "launcher/openai_api.h"

#include <algorithm>
#include <ctime>
#include <random>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "boost/asio/post.hpp"
#include "launcher/embedding_job.h"
#include "launcher/json_text.h"
#include "launcher/log.h"
#include "launcher/openai_job.h"
#include "launcher/trace_parent.h"
#include "launcher/web_page.h"
#include "nlohmann/json.hpp"

namespace shoal {
namespace {

namespace asio = boost::asio;
using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

constexpr int kParserThreads = 1;

// The host of a Host header or an origin, without its port: "[::1]:8080" -> "::1".
std::string HostName(std::string_view authority) {
  if (!authority.empty() && authority.front() == '[') {
    return std::string(authority.substr(1, authority.find(']') - 1));
  }
  return absl::AsciiStrToLower(std::string(authority.substr(0, authority.rfind(':'))));
}

bool IsLocalName(std::string_view name) {
  return name == "localhost" || name == "127.0.0.1" || name == "::1" ||
         (name.size() > 10 && name.substr(name.size() - 10) == ".localhost");
}

bool Listed(const std::vector<std::string>& list, std::string_view value) {
  return std::any_of(list.begin(), list.end(),
                     [&](const std::string& s) { return s == "*" || s == value; });
}

}  // namespace

const std::map<std::string, OpenAiApi::Route, std::less<>>& OpenAiApi::Routes() {
  static const auto* const routes = new std::map<std::string, Route, std::less<>>{
      {"/", {"GET", false, false, &OpenAiApi::Page}},
      {"/health/live", {"GET", true, false, &OpenAiApi::Live}},
      {"/health/ready", {"GET", false, false, &OpenAiApi::Ready}},
      {"/metrics", {"GET", false, false, &OpenAiApi::MetricsText}},
      {"/status", {"GET", false, false, &OpenAiApi::Status}},
      {"/v1/models", {"GET", false, false, &OpenAiApi::Models}},
      {"/tokenize", {"POST", false, false, &OpenAiApi::Tokenize}},
      {"/detokenize", {"POST", false, false, &OpenAiApi::Detokenize}},
      {"/v1/completions", {"POST", false, true, &OpenAiApi::Completions}},
      {"/v1/chat/completions", {"POST", false, true, &OpenAiApi::ChatCompletions}},
      {"/v1/embeddings", {"POST", false, true, &OpenAiApi::Embeddings}},
  };
  return *routes;
}

OpenAiApi::OpenAiApi(asio::io_context& io, ApiOptions options, const ModelContext& model,
                     ClientLimiter& limiter, Coordinator& coordinator, const Supervisor& supervisor,
                     Metrics& metrics)
    : io_(io),
      options_(std::move(options)),
      model_(model),
      coordinator_(coordinator),
      supervisor_(supervisor),
      metrics_(metrics),
      limiter_(limiter),
      id_prefix_(absl::StrCat(absl::Hex(std::random_device{}(), absl::kZeroPad8))),
      pool_(kParserThreads) {}

OpenAiApi::~OpenAiApi() { pool_.join(); }

// A page on another site must not use this server through its visitor's browser: neither directly
// nor by a name that it points at this machine (DNS rebinding).
std::optional<HttpAnswer> OpenAiApi::CheckOrigin(const HttpRequest& request) const {
  const std::string host = HostName(request.Header("host"));
  if (options_.loopback && !host.empty() && !IsLocalName(host) &&
      !Listed(options_.allowed_hosts, host)) {
    return ErrorAnswer(403,
                       absl::StrCat("this server listens on the local machine and does not "
                                    "answer to the name '",
                                    ClipText(host, 100), "'; allow it with --allowed-host"),
                       "host_not_allowed");
  }
  const std::string_view origin = request.Header("origin");
  if (origin.empty() || Listed(options_.cors_origins, origin)) return std::nullopt;
  const size_t scheme = origin.find("://");
  const std::string_view authority =
      scheme == std::string_view::npos ? origin : origin.substr(scheme + 3);
  if (authority == request.Header("host")) return std::nullopt;
  return ErrorAnswer(403,
                     "pages of other origins may not use this server; allow one with "
                     "--cors-origin",
                     "origin_not_allowed");
}

std::optional<std::string> OpenAiApi::ClientOf(const HttpRequest& request) const {
  if (!options_.keys.required()) return std::string("anonymous");
  return options_.keys.Identify(KeyFromAuthorization(request.Header("authorization")));
}

void OpenAiApi::AddCors(const HttpRequest& request, HttpAnswer* answer) const {
  const std::string_view origin = request.Header("origin");
  if (origin.empty() || !Listed(options_.cors_origins, origin)) return;
  answer->headers.emplace_back("Access-Control-Allow-Origin", std::string(origin));
  answer->headers.emplace_back("Vary", "Origin");
}

std::optional<HttpAnswer> OpenAiApi::OnHeaders(const HttpRequest& request) {
  const auto refuse = [&](HttpAnswer answer) {
    AddCors(request, &answer);
    metrics_.HttpAnswered(answer.status);
    return std::optional<HttpAnswer>(std::move(answer));
  };
  if (auto answer = CheckOrigin(request)) return refuse(*std::move(answer));
  const auto route = Routes().find(request.path);
  const bool known = route != Routes().end();
  if (request.method == "OPTIONS" && !request.Header("origin").empty() && known) {
    HttpAnswer preflight{.status = 204, .content_type = "", .body = ""};
    preflight.headers = {{"Access-Control-Allow-Methods", "GET, POST"},
                         {"Access-Control-Allow-Headers", "authorization, content-type"},
                         {"Access-Control-Max-Age", "600"}};
    return refuse(std::move(preflight));
  }
  const std::optional<std::string> client = ClientOf(request);
  if (!client.has_value() && !(known && route->second.open)) {
    HttpAnswer answer = ErrorAnswer(401, "a valid API key is needed (Authorization: Bearer ...)",
                                    "invalid_api_key");
    // A browser that opens the page then asks for the key as the password.
    if (request.path == "/") {
      answer.headers.emplace_back("WWW-Authenticate", "Basic realm=\"shoal: key as password\"");
    }
    return refuse(std::move(answer));
  }
  if (!known) {
    return refuse(
        ErrorAnswer(404, absl::StrCat("no such route: ", ClipText(request.path, 100)), ""));
  }
  const std::string_view method = request.method;
  if (method != route->second.method &&
      !(method == "HEAD" && std::string_view(route->second.method) == "GET")) {
    HttpAnswer answer = ErrorAnswer(
        405, absl::StrCat(ClipText(request.path, 100), " takes ", route->second.method), "");
    answer.headers.emplace_back("Allow", route->second.method);
    return refuse(std::move(answer));
  }
  if (!route->second.generates) return std::nullopt;
  // Cheap refusals, before a body is read or a prompt is tokenized.
  if (absl::Status s = coordinator_.CheckAdmission(); !s.ok()) return refuse(ErrorAnswer(s));
  return std::nullopt;
}

HttpAnswer OpenAiApi::OnBadRequest(int status, const std::string& message) {
  metrics_.HttpAnswered(status);
  return ErrorAnswer(status, message, "");
}

void OpenAiApi::Answer(const Exchange& exchange, HttpAnswer answer) const {
  metrics_.HttpAnswered(answer.status);
  exchange->Respond(std::move(answer));
}

void OpenAiApi::OnRequest(std::shared_ptr<HttpExchange> exchange) {
  HttpAnswer cors;
  AddCors(exchange->request(), &cors);
  for (auto& [name, value] : cors.headers) exchange->AddHeader(name, value);
  const std::string_view trace = TraceParent(exchange->request().Header("traceparent"));
  if (!trace.empty()) exchange->AddHeader("traceparent", std::string(trace));
  (this->*Routes().find(exchange->request().path)->second.handle)(exchange);
}

// Runs `parse` on the pool with the exchange's body and `then` back on the coordinator's thread.
template <typename Parsed>
void OpenAiApi::Parse(const Exchange& exchange,
                      absl::StatusOr<Parsed> (*parse)(std::string_view, const ModelContext&),
                      std::function<void(absl::StatusOr<Parsed>)> then) {
  asio::post(pool_, [this, exchange = exchange, parse, then = std::move(then)]() mutable {
    auto parsed = std::make_shared<absl::StatusOr<Parsed>>(parse(exchange->request().body, model_));
    // The exchange goes back for good: its last owner ends it, and only one thread may do that.
    asio::post(io_, [exchange = std::move(exchange), parsed, then = std::exchange(then, nullptr)] {
      then(std::move(*parsed));
    });
  });
}

std::optional<OpenAiApi::Counted> OpenAiApi::Count(const Exchange& exchange) {
  Counted c;
  c.client = ClientOf(exchange->request()).value_or("");
  if (const std::optional<int> wait = limiter_.Begin(c.client, Clock::now())) {
    HttpAnswer answer = ErrorAnswer(429, "this key makes too many requests", "rate_limit_exceeded");
    for (auto& [name, value] : answer.headers) {
      if (name == "Retry-After") value = absl::StrCat(*wait);
    }
    Answer(exchange, std::move(answer));
    return std::nullopt;
  }
  c.id = absl::StrCat(id_prefix_, absl::Hex(next_id_++, absl::kZeroPad8));
  c.done = [this, client = c.client, id = c.id, exchange, began = Clock::now()](int status) {
    limiter_.End(client);
    metrics_.HttpAnswered(status);
    const HttpRequest& r = exchange->request();
    LogRequest({.id = id,
                .method = r.method,
                .path = r.path,
                .client = client,
                .trace = TraceParent(r.Header("traceparent")),
                .status = status,
                .seconds = std::chrono::duration<double>(Clock::now() - began).count()});
  };
  return c;
}

void OpenAiApi::Complete(const Exchange& exchange,
                         absl::StatusOr<OpenAiRequest> (*parse)(std::string_view,
                                                                const ModelContext&)) {
  std::optional<Counted> counted = Count(exchange);
  if (!counted.has_value()) return;
  Parse<OpenAiRequest>(exchange, parse,
                       [this, exchange, c = *counted](absl::StatusOr<OpenAiRequest> request) {
                         if (!request.ok()) {
                           HttpAnswer answer = ErrorAnswer(request.status());
                           c.done(answer.status);
                           return exchange->Respond(std::move(answer));
                         }
                         std::make_shared<OpenAiJob>(exchange, *std::move(request), c.id, model_,
                                                     coordinator_, c.done)
                             ->Start(c.client);
                       });
}

void OpenAiApi::ChatCompletions(const Exchange& exchange) { Complete(exchange, &ParseChatRequest); }
void OpenAiApi::Completions(const Exchange& exchange) {
  Complete(exchange, &ParseCompletionRequest);
}

void OpenAiApi::Embeddings(const Exchange& exchange) {
  std::optional<Counted> counted = Count(exchange);
  if (!counted.has_value()) return;
  Parse<EmbeddingRequest>(exchange, &ParseEmbeddingRequest,
                          [this, exchange, c = *counted](absl::StatusOr<EmbeddingRequest> request) {
                            if (!request.ok()) {
                              HttpAnswer answer = ErrorAnswer(request.status());
                              c.done(answer.status);
                              return exchange->Respond(std::move(answer));
                            }
                            std::make_shared<EmbeddingJob>(exchange, *std::move(request), model_,
                                                           coordinator_, c.done)
                                ->Start(c.client);
                          });
}

void OpenAiApi::Models(const Exchange& exchange) {
  const Json body = {{"object", "list"},
                     {"data",
                      {{{"id", model_.name},
                        {"object", "model"},
                        {"created", static_cast<int64_t>(std::time(nullptr))},
                        {"owned_by", "shoal"},
                        {"max_model_len", coordinator_.context()}}}}};
  Answer(exchange, {.body = DumpJson(body)});
}

void OpenAiApi::Tokenize(const Exchange& exchange) {
  Parse<std::vector<int32_t>>(
      exchange, &ParseTokenizeRequest, [this, exchange](absl::StatusOr<std::vector<int32_t>> ids) {
        if (!ids.ok()) return Answer(exchange, ErrorAnswer(ids.status()));
        const Json body = {
            {"count", ids->size()}, {"max_model_len", coordinator_.context()}, {"tokens", *ids}};
        Answer(exchange, {.body = DumpJson(body)});
      });
}

void OpenAiApi::Detokenize(const Exchange& exchange) {
  Parse<std::string>(exchange, &ParseDetokenizeRequest,
                     [this, exchange](absl::StatusOr<std::string> text) {
                       if (!text.ok()) return Answer(exchange, ErrorAnswer(text.status()));
                       const Json body = {{"content", *text}, {"prompt", *text}};
                       Answer(exchange, {.body = DumpJson(body)});
                     });
}

void OpenAiApi::Live(const Exchange& exchange) { Answer(exchange, {.body = R"({"status":"ok"})"}); }

void OpenAiApi::Ready(const Exchange& exchange) {
  if (const absl::Status s = coordinator_.CheckAdmission(); !s.ok()) {
    return Answer(exchange, ErrorAnswer(503, std::string(s.message()), ""));
  }
  Answer(exchange, {.body = R"({"status":"ok"})"});
}

void OpenAiApi::MetricsText(const Exchange& exchange) {
  Answer(exchange,
         {.content_type = "text/plain; version=0.0.4; charset=utf-8", .body = metrics_.Text()});
}

std::string OpenAiApi::StatusJson() const {
  const engine::v1::Hello& hello = coordinator_.hello();
  const engine::v1::Heartbeat& beat = coordinator_.heartbeat();
  Json ranks = Json::array();
  for (const engine::v1::RankInfo& r : hello.ranks()) {
    ranks.push_back({{"rank", r.rank()},
                     {"host", r.host()},
                     {"stage", r.stage()},
                     {"layers", {r.layer_begin(), r.layer_end()}},
                     {"heads", r.heads()},
                     {"weight_bytes", r.weight_bytes()},
                     {"kv_bytes", r.kv_bytes()},
                     {"workspace_bytes", r.workspace_bytes()},
                     {"streamed_bytes", r.streamed_bytes()}});
  }
  const Json body = {
      {"state", StateName(supervisor_.state())},
      {"reason", supervisor_.reason()},
      {"restarts", supervisor_.restarts()},
      {"model", model_.name},
      {"context", hello.context()},
      {"slots", hello.slots()},
      {"tp", hello.tp()},
      {"pp", hello.pp()},
      {"backend", hello.backend()},
      {"load_seconds", hello.load_seconds()},
      {"unfinished", coordinator_.unfinished()},
      {"running", beat.running()},
      {"waiting", beat.waiting()},
      {"kv_blocks", {beat.blocks_in_use(), beat.blocks_total()}},
      {"tokens_per_second", coordinator_.tokens_per_second()},
      {"preempted", beat.preempted()},
      {"prompt_tokens", beat.prompt_tokens()},
      {"cached_tokens", beat.cached_tokens()},
      {"ranks", std::move(ranks)},
  };
  return DumpJson(body);
}

void OpenAiApi::Status(const Exchange& exchange) { Answer(exchange, {.body = StatusJson()}); }

void OpenAiApi::Page(const Exchange& exchange) {
  HttpAnswer answer{.content_type = "text/html; charset=utf-8", .body = std::string(WebPage())};
  // The model's output is shown on it: no script but the page's own may ever run there.
  answer.headers = {{"Content-Security-Policy", std::string(WebPagePolicy())},
                    {"X-Content-Type-Options", "nosniff"},
                    {"X-Frame-Options", "DENY"},
                    {"Referrer-Policy", "no-referrer"}};
  Answer(exchange, std::move(answer));
}

}  // namespace shoal
