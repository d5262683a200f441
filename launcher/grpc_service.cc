#include "launcher/grpc_service.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "boost/asio/post.hpp"
#include "boost/asio/steady_timer.hpp"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/grpcpp.h"
#include "grpcpp/health_check_service_interface.h"
#include "kernels/mutex.h"
#include "kernels/status_macros.h"
#include "launcher/json_text.h"
#include "launcher/kserve_service.h"
#include "launcher/log.h"
#include "launcher/proto/coordinator.grpc.pb.h"
#include "launcher/trace_parent.h"
#include "nlohmann/json.hpp"

namespace shoal {
namespace {

namespace asio = boost::asio;
using Json = nlohmann::ordered_json;

constexpr size_t kMaxUnsent = 4096;  // messages of one slow client
constexpr int kMaxMessageBytes = 16 << 20;
constexpr char kServiceName[] = "shoal.v1.Coordinator";
constexpr char kKServeName[] = "inference.GRPCInferenceService";

grpc::Status ToGrpc(const absl::Status& s) {
  return {static_cast<grpc::StatusCode>(s.code()), std::string(s.message())};
}

// The same request as an OpenAI body, so that both front ends share one set of checks.
std::string ToJson(const v1::GenerateRequest& r, bool* chat) {
  Json j = Json::object();
  *chat = r.has_chat();
  if (r.has_chat()) {
    j["messages"] = Json::array();
    for (const v1::Message& m : r.chat().messages()) {
      j["messages"].push_back({{"role", m.role()}, {"content", m.content()}});
    }
  } else if (r.has_tokens()) {
    j["prompt"] = Json::array({Json::array()});
    for (int32_t id : r.tokens().ids()) j["prompt"][0].push_back(id);
  } else if (r.has_prompt()) {
    j["prompt"] = r.prompt();
  }  // none of them: refused for the missing prompt
  j["max_tokens"] = r.has_max_tokens() ? r.max_tokens() : 1 << 24;
  const v1::SamplingParams& s = r.sampling();
  if (s.has_temperature()) j["temperature"] = s.temperature();
  if (s.has_top_k()) j["top_k"] = s.top_k();
  if (s.has_top_p()) j["top_p"] = s.top_p();
  if (s.has_min_p()) j["min_p"] = s.min_p();
  if (s.has_repeat_penalty()) j["repeat_penalty"] = s.repeat_penalty();
  if (s.has_presence_penalty()) j["presence_penalty"] = s.presence_penalty();
  if (s.has_frequency_penalty()) j["frequency_penalty"] = s.frequency_penalty();
  if (s.has_seed()) j["seed"] = s.seed();
  for (const auto& [token, bias] : s.logit_bias()) j["logit_bias"][absl::StrCat(token)] = bias;
  for (const std::string& stop : r.stop()) j["stop"].push_back(stop);
  if (r.ignore_eos()) j["ignore_eos"] = true;
  if (r.logprobs() || r.top_logprobs() > 0) {
    if (*chat) {
      j["logprobs"] = true;
      j["top_logprobs"] = r.top_logprobs();
    } else {
      j["logprobs"] = r.top_logprobs();
    }
  }
  if (!r.json_schema().empty()) {
    Json schema = Json::parse(r.json_schema(), nullptr, /*allow_exceptions=*/false);
    if (schema.is_discarded()) schema = Json();
    j["response_format"] = {{"type", "json_schema"}, {"json_schema", {{"schema", schema}}}};
  }
  return DumpJson(j);
}

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream in(path);
  std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  if (!in) return absl::NotFoundError(absl::StrCat("cannot read ", path));
  return text;
}

// A stream of messages to one client: written one at a time, kept alive until gRPC is done with it.
template <typename Message>
class StreamReactor : public grpc::ServerWriteReactor<Message>,
                      public std::enable_shared_from_this<StreamReactor<Message>> {
 public:
  // gRPC holds the reactor from now on.
  void Hold() { self_ = this->shared_from_this(); }
  void SetOnCancel(const std::function<void()>& f) {
    bool now = false;
    {
      MutexLock lock(&mu_);
      now = cancelled_;
      if (!now) on_cancel_ = f;
    }
    if (now) f();
  }
  // Called when the call is over, with its outcome. REQUIRES: before Push and End.
  void SetOnDone(std::function<void(grpc::StatusCode)> f) { on_done_ = std::move(f); }
  // False when the client reads too slowly or is gone.
  bool Push(Message message) {
    MutexLock lock(&mu_);
    if (cancelled_ || ending_.has_value() || unsent_.size() >= kMaxUnsent) return false;
    unsent_.push_back(std::move(message));
    WriteNext();
    return true;
  }
  // After everything pushed.
  void End(const grpc::Status& status) {
    MutexLock lock(&mu_);
    if (ending_.has_value()) return;
    ending_ = status;
    WriteNext();
  }

 private:
  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (writing_ || finished_) return;
    if (!unsent_.empty()) {
      writing_ = true;
      current_ = std::move(unsent_.front());
      unsent_.pop_front();
      this->StartWrite(&current_);
    } else if (ending_.has_value()) {
      finished_ = true;
      this->Finish(*ending_);
    }
  }
  void OnWriteDone(bool ok) override {
    MutexLock lock(&mu_);
    writing_ = false;
    if (!ok) {
      unsent_.clear();
      if (!ending_.has_value()) ending_ = grpc::Status::CANCELLED;
    }
    WriteNext();
  }
  void OnCancel() override {
    std::function<void()> f;
    {
      MutexLock lock(&mu_);
      cancelled_ = true;
      f = std::move(on_cancel_);
    }
    if (f) f();
    End(grpc::Status::CANCELLED);
  }
  void OnDone() override {
    if (on_done_) {
      MutexLock lock(&mu_);
      on_done_(ending_.has_value() ? ending_->error_code() : grpc::StatusCode::CANCELLED);
    }
    self_.reset();
  }

  Mutex mu_;
  std::deque<Message> unsent_ ABSL_GUARDED_BY(mu_);
  Message current_ ABSL_GUARDED_BY(mu_);
  std::optional<grpc::Status> ending_ ABSL_GUARDED_BY(mu_);
  std::function<void()> on_cancel_ ABSL_GUARDED_BY(mu_);
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  std::function<void(grpc::StatusCode)> on_done_;
  std::shared_ptr<StreamReactor> self_;
};

}  // namespace

class GrpcServer::Service : public v1::Coordinator::CallbackService {
 public:
  Service(asio::io_context& io, GrpcOptions options, const ApiKeys& keys, const ModelContext& model,
          ClientLimiter& limiter, shoal::Coordinator& coordinator, const Supervisor& supervisor)
      : io_(io),
        options_(std::move(options)),
        keys_(keys),
        model_(model),
        limiter_(limiter),
        coordinator_(coordinator),
        supervisor_(supervisor),
        kserve_(
            model.name,
            [this](const grpc::CallbackServerContext& c) { return ClientOf(c).has_value(); },
            [this] { return serving_.load(); }) {}

  absl::Status Start();
  int port() const { return port_; }
  void SetServing(bool serving) {
    if (server_ == nullptr || serving == serving_) return;
    serving_ = serving;
    served_ = served_ || serving;
    server_->GetHealthCheckService()->SetServingStatus("", serving);
    server_->GetHealthCheckService()->SetServingStatus(kServiceName, serving);
    server_->GetHealthCheckService()->SetServingStatus(kKServeName, serving);
  }
  void Shutdown() {
    if (server_ == nullptr) return;
    closing_ = true;
    server_->Shutdown(std::chrono::system_clock::now() + std::chrono::milliseconds(200));
    server_->Wait();
    server_.reset();
  }

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(
      grpc::CallbackServerContext* context, const v1::GenerateRequest* request) override;
  grpc::ServerWriteReactor<v1::ClusterStatusResponse>* ClusterStatus(
      grpc::CallbackServerContext* context, const v1::ClusterStatusRequest* request) override;
  grpc::ServerUnaryReactor* Cancel(grpc::CallbackServerContext* context,
                                   const v1::CancelRequest* request,
                                   v1::CancelResponse* response) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override;
  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context,
                                       const v1::ListModelsRequest* request,
                                       v1::ListModelsResponse* response) override;

 private:
  using Generation = StreamReactor<v1::GenerateResponse>;
  using Watch = StreamReactor<v1::ClusterStatusResponse>;
  struct Open {
    std::string client;
    uint64_t generation = 0;
    std::shared_ptr<Generation> reactor;
  };

  std::optional<std::string> ClientOf(const grpc::CallbackServerContext& context) const;
  void Submit(const std::shared_ptr<Generation>& reactor, GenerateRequest request);
  void OnUpdate(const std::string& id, const GenerateUpdate& update);
  void ShowStatus(const std::shared_ptr<Watch>& watch, std::chrono::milliseconds interval);
  static grpc::ServerUnaryReactor* Reply(grpc::CallbackServerContext* context,
                                         const grpc::Status& status) {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(status);
    return reactor;
  }
  static grpc::Status NoKey() {
    return {grpc::StatusCode::UNAUTHENTICATED,
            "a valid API key is needed (authorization metadata)"};
  }

  asio::io_context& io_;
  const GrpcOptions options_;
  const ApiKeys& keys_;
  const ModelContext& model_;
  ClientLimiter& limiter_;
  shoal::Coordinator& coordinator_;
  const Supervisor& supervisor_;
  KServeService kserve_;
  std::unique_ptr<grpc::Server> server_;
  int port_ = -1;
  std::atomic<bool> serving_{false};
  std::atomic<bool> served_{false};  // it was true once
  std::atomic<bool> closing_{false};
  std::atomic<uint64_t> calls_{0};
  std::map<std::string, Open> open_;  // the coordinator's thread only
};

absl::Status GrpcServer::Service::Start() {
  if (options_.port < 0) return absl::OkStatus();
  std::shared_ptr<grpc::ServerCredentials> credentials = grpc::InsecureServerCredentials();
  if (!options_.tls_certificate.empty()) {
    grpc::SslServerCredentialsOptions tls;
    grpc::SslServerCredentialsOptions::PemKeyCertPair pair;
    SHOAL_ASSIGN_OR_RETURN(pair.private_key, ReadFile(options_.tls_key));
    SHOAL_ASSIGN_OR_RETURN(pair.cert_chain, ReadFile(options_.tls_certificate));
    tls.pem_key_cert_pairs.push_back(std::move(pair));
    if (!options_.client_ca.empty()) {
      SHOAL_ASSIGN_OR_RETURN(tls.pem_root_certs, ReadFile(options_.client_ca));
      tls.client_certificate_request = GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY;
    }
    credentials = grpc::SslServerCredentials(tls);
  }
  grpc::EnableDefaultHealthCheckService(true);
  if (options_.reflection) grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  const bool v6 = options_.address.find(':') != std::string::npos;
  builder.AddListeningPort(
      absl::StrCat(v6 ? "[" : "", options_.address, v6 ? "]:" : ":", options_.port), credentials,
      &port_);
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.RegisterService(this);
  builder.RegisterService(&kserve_);
  server_ = builder.BuildAndStart();
  if (server_ == nullptr || port_ <= 0) {
    return absl::UnavailableError(absl::StrCat("cannot listen for gRPC on ", options_.address,
                                               " port ", options_.port,
                                               ": most likely it is taken; choose another with "
                                               "--grpc-port"));
  }
  server_->GetHealthCheckService()->SetServingStatus("", false);
  server_->GetHealthCheckService()->SetServingStatus(kServiceName, false);
  server_->GetHealthCheckService()->SetServingStatus(kKServeName, false);
  return absl::OkStatus();
}

std::optional<std::string> GrpcServer::Service::ClientOf(
    const grpc::CallbackServerContext& context) const {
  if (!keys_.required()) return std::string("anonymous");
  const auto& metadata = context.client_metadata();
  const auto it = metadata.find("authorization");
  if (it == metadata.end()) return std::nullopt;
  return keys_.Identify(
      KeyFromAuthorization(std::string_view(it->second.data(), it->second.size())));
}

grpc::ServerWriteReactor<v1::GenerateResponse>* GrpcServer::Service::Generate(
    grpc::CallbackServerContext* context, const v1::GenerateRequest* request) {
  auto reactor = std::make_shared<Generation>();
  reactor->Hold();
  const std::optional<std::string> client = ClientOf(*context);
  if (!client.has_value()) {
    reactor->End(NoKey());
    return reactor.get();
  }
  // Cheap refusals, before a prompt is tokenized. What the last tick saw may be old when the model
  // has just been loaded: then Submit decides.
  if (!serving_ && served_) {
    reactor->End({grpc::StatusCode::UNAVAILABLE, "the server takes no requests now"});
    return reactor.get();
  }
  if (const std::optional<int> wait = limiter_.Begin(*client, std::chrono::steady_clock::now())) {
    reactor->End({grpc::StatusCode::RESOURCE_EXHAUSTED,
                  absl::StrCat("this key makes too many requests: try again in ", *wait, " s")});
    return reactor.get();
  }
  std::string trace;
  if (const auto it = context->client_metadata().find("traceparent");
      it != context->client_metadata().end()) {
    trace = TraceParent(std::string_view(it->second.data(), it->second.size()));
  }
  if (!trace.empty()) context->AddInitialMetadata("traceparent", trace);
  reactor->SetOnDone([this, client = *client, trace, id = absl::StrCat("rpc-", ++calls_),
                      began = std::chrono::steady_clock::now()](grpc::StatusCode code) {
    limiter_.End(client);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
    LogRequest({.id = id,
                .method = "gRPC",
                .path = "/shoal.v1.Coordinator/Generate",
                .client = client,
                .trace = trace,
                .status = code,
                .seconds = took.count()});
  });
  bool chat = false;
  const std::string body = ToJson(*request, &chat);
  absl::StatusOr<OpenAiRequest> parsed =
      chat ? ParseChatRequest(body, model_) : ParseCompletionRequest(body, model_);
  if (!parsed.ok()) {
    reactor->End(ToGrpc(parsed.status()));
    return reactor.get();
  }
  GenerateRequest g = std::move(parsed->generate);
  g.prompt = std::move(parsed->prompts[0]);
  g.client = *client;
  if (parsed->random_seed) {
    g.sampling.seed =
        static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
  }
  const auto deadline = context->deadline();
  if (deadline != std::chrono::system_clock::time_point::max()) {
    g.deadline = std::chrono::steady_clock::now() + (deadline - std::chrono::system_clock::now());
  }
  asio::post(io_, [this, reactor, g = std::move(g)]() mutable { Submit(reactor, std::move(g)); });
  return reactor.get();
}

void GrpcServer::Service::Submit(const std::shared_ptr<Generation>& reactor,
                                 GenerateRequest request) {
  const std::string client = request.client;
  const auto id = std::make_shared<std::string>();
  const absl::StatusOr<uint64_t> generation = coordinator_.Submit(
      std::move(request), [this, id](const GenerateUpdate& u) { OnUpdate(*id, u); });
  if (!generation.ok()) return reactor->End(ToGrpc(generation.status()));
  *id = absl::StrCat("gen-", *generation);
  open_[*id] = {client, *generation, reactor};
  reactor->SetOnCancel([this, id] {
    if (closing_) return;
    asio::post(io_, [this, id] {
      const auto it = open_.find(*id);
      if (it == open_.end()) return;
      coordinator_.Cancel(it->second.generation);
      open_.erase(it);
    });
  });
}

void GrpcServer::Service::OnUpdate(const std::string& id, const GenerateUpdate& update) {
  const auto it = open_.find(id);
  if (it == open_.end()) return;
  const std::shared_ptr<Generation> reactor = it->second.reactor;
  if (!update.error.ok()) {
    open_.erase(it);
    return reactor->End(ToGrpc(update.error));
  }
  v1::GenerateResponse response;
  response.set_id(id);
  response.set_text(update.text);
  for (const GeneratedToken& t : update.tokens) {
    v1::GeneratedToken& token = *response.add_tokens();
    token.set_token(t.token);
    token.set_logprob(t.logprob);
    for (const Candidate& c : t.top) {
      v1::TokenLogprob& top = *token.add_top();
      top.set_token(c.token);
      top.set_logprob(c.logit);
    }
  }
  if (update.done()) {
    response.set_finish_reason(update.finish == FinishReason::kLength ? "length" : "stop");
    response.mutable_usage()->set_prompt_tokens(update.prompt_tokens);
    response.mutable_usage()->set_completion_tokens(update.completion_tokens);
    response.mutable_usage()->set_cached_tokens(update.cached_tokens);
  }
  const uint64_t generation = it->second.generation;
  const bool sent = reactor->Push(std::move(response));
  if (update.done()) {
    open_.erase(it);
    reactor->End(grpc::Status::OK);
  } else if (!sent) {
    open_.erase(it);
    coordinator_.Cancel(generation);
    reactor->End({grpc::StatusCode::RESOURCE_EXHAUSTED, "the client reads too slowly"});
  }
}

grpc::ServerUnaryReactor* GrpcServer::Service::Cancel(grpc::CallbackServerContext* context,
                                                      const v1::CancelRequest* request,
                                                      v1::CancelResponse* response) {
  const std::optional<std::string> client = ClientOf(*context);
  if (!client.has_value()) return Reply(context, NoKey());
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  asio::post(io_, [this, reactor, response, id = request->id(), client = *client] {
    const auto it = open_.find(id);
    response->set_found(it != open_.end() && it->second.client == client);
    if (response->found()) {
      const std::shared_ptr<Generation> generation = it->second.reactor;
      coordinator_.Cancel(it->second.generation);
      open_.erase(it);
      generation->End(grpc::Status::CANCELLED);
    }
    reactor->Finish(grpc::Status::OK);
  });
  return reactor;
}

grpc::ServerUnaryReactor* GrpcServer::Service::Tokenize(grpc::CallbackServerContext* context,
                                                        const v1::TokenizeRequest* request,
                                                        v1::TokenizeResponse* response) {
  if (!ClientOf(*context).has_value()) return Reply(context, NoKey());
  const absl::StatusOr<std::vector<int32_t>> ids =
      model_.tokenizer->Encode(request->text(), request->add_special(), request->parse_special());
  if (!ids.ok()) return Reply(context, ToGrpc(ids.status()));
  response->mutable_ids()->Add(ids->begin(), ids->end());
  return Reply(context, grpc::Status::OK);
}

grpc::ServerUnaryReactor* GrpcServer::Service::Detokenize(grpc::CallbackServerContext* context,
                                                          const v1::DetokenizeRequest* request,
                                                          v1::DetokenizeResponse* response) {
  if (!ClientOf(*context).has_value()) return Reply(context, NoKey());
  const std::vector<int32_t> ids(request->ids().begin(), request->ids().end());
  Utf8Stream utf8;
  std::string text = utf8.Push(model_.tokenizer->Decode(ids, /*render_special=*/false));
  response->set_text(text + utf8.Finish());
  return Reply(context, grpc::Status::OK);
}

grpc::ServerUnaryReactor* GrpcServer::Service::ListModels(grpc::CallbackServerContext* context,
                                                          const v1::ListModelsRequest*,
                                                          v1::ListModelsResponse* response) {
  if (!ClientOf(*context).has_value()) return Reply(context, NoKey());
  response->add_models(model_.name);
  return Reply(context, grpc::Status::OK);
}

grpc::ServerWriteReactor<v1::ClusterStatusResponse>* GrpcServer::Service::ClusterStatus(
    grpc::CallbackServerContext* context, const v1::ClusterStatusRequest* request) {
  auto watch = std::make_shared<Watch>();
  watch->Hold();
  if (!ClientOf(*context).has_value()) {
    watch->End(NoKey());
    return watch.get();
  }
  const int ms =
      request->interval_ms() == 0 ? 1000 : std::clamp(request->interval_ms(), 100, 60000);
  const std::chrono::milliseconds interval(request->watch() ? ms : 0);
  asio::post(io_, [this, watch, interval] { ShowStatus(watch, interval); });
  return watch.get();
}

void GrpcServer::Service::ShowStatus(const std::shared_ptr<Watch>& watch,
                                     std::chrono::milliseconds interval) {
  const engine::v1::Hello& hello = coordinator_.hello();
  const engine::v1::Heartbeat& beat = coordinator_.heartbeat();
  v1::ClusterStatusResponse r;
  r.set_state(StateName(supervisor_.state()));
  r.set_reason(supervisor_.reason());
  r.set_model(model_.name);
  r.set_context(hello.context());
  r.set_restarts(supervisor_.restarts());
  r.set_running(beat.running());
  r.set_waiting(beat.waiting());
  if (beat.blocks_total() > 0) {
    r.set_kv_usage(static_cast<double>(beat.blocks_in_use()) / beat.blocks_total());
  }
  r.set_tokens_per_second(coordinator_.tokens_per_second());
  for (const engine::v1::RankInfo& info : hello.ranks()) {
    v1::Rank& rank = *r.add_ranks();
    rank.set_rank(info.rank());
    rank.set_host(info.host());
    rank.set_stage(info.stage());
    rank.set_layer_begin(info.layer_begin());
    rank.set_layer_end(info.layer_end());
    rank.set_heads(info.heads());
    rank.set_weight_bytes(info.weight_bytes());
    rank.set_kv_bytes(info.kv_bytes());
    rank.set_workspace_bytes(info.workspace_bytes());
    rank.set_streamed_bytes(info.streamed_bytes());
  }
  if (!watch->Push(std::move(r)) || interval.count() == 0) return watch->End(grpc::Status::OK);
  auto timer = std::make_shared<asio::steady_timer>(io_, interval);
  timer->async_wait([this, watch, interval, timer](const boost::system::error_code& error) {
    if (!error && !closing_) ShowStatus(watch, interval);
  });
}

GrpcServer::GrpcServer(asio::io_context& io, GrpcOptions options, const ApiKeys& keys,
                       const ModelContext& model, ClientLimiter& limiter, Coordinator& coordinator,
                       const Supervisor& supervisor)
    : service_(std::make_unique<Service>(io, std::move(options), keys, model, limiter, coordinator,
                                         supervisor)) {}
GrpcServer::~GrpcServer() { Shutdown(); }
absl::Status GrpcServer::Start() { return service_->Start(); }
int GrpcServer::port() const { return service_->port(); }
void GrpcServer::SetServing(bool serving) { service_->SetServing(serving); }
void GrpcServer::Shutdown() { service_->Shutdown(); }

}  // namespace shoal
