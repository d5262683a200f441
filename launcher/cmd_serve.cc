// `shoal serve`: the coordinator process.
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "boost/asio/io_context.hpp"
#include "boost/asio/ip/address.hpp"
#include "boost/asio/signal_set.hpp"
#include "boost/asio/steady_timer.hpp"
#include "fmt/format.h"
#include "kernels/status_macros.h"
#include "launcher/commands.h"
#include "launcher/coordinator.h"
#include "launcher/demo_model.h"
#include "launcher/exit_code.h"
#include "launcher/flags.h"
#include "launcher/grpc_service.h"
#include "launcher/http_server.h"
#include "launcher/log.h"
#include "launcher/openai_api.h"
#include "launcher/supervisor.h"
#include "launcher/world.h"
#include "shard/checkpoint.h"

namespace shoal {
namespace {

namespace asio = boost::asio;
using boost::system::error_code;

constexpr std::chrono::milliseconds kTick{100};

struct ServeFlags {
  ModelFlags model;
  std::string alias;
  int parallel = 16;
  bool no_prefix_cache = false;
  HttpServerOptions http;
  GrpcOptions grpc;
  bool no_grpc = false;
  std::string key_file;
  ClientLimits client_limits;
  CoordinatorLimits limits;
  std::vector<std::string> cors_origins;
  std::vector<std::string> allowed_hosts;
  double shutdown_timeout = 30;
  double hang_timeout = 5;
  bool log_json = false;
  bool quiet = false;
};

// The engine's command line; --socket is added at each start.
absl::StatusOr<std::vector<std::string>> EngineCommand(const ServeFlags& f) {
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error) return absl::InternalError("cannot read /proc/self/exe");
  const ModelFlags& m = f.model;
  std::vector<std::string> command = {self.string(), "engine"};
  const auto add = [&](const char* flag, const std::string& value) {
    if (value.empty()) return;
    command.push_back(flag);
    command.push_back(value);
  };
  add("-m", m.model);
  if (m.context_given) add("-c", absl::StrCat(m.context));
  if (m.threads > 0) add("-t", absl::StrCat(m.threads));
  add("--tp", absl::StrCat(m.tp));
  add("--pp", absl::StrCat(m.pp));
  add("--split", m.split);
  add("--pp-layers", m.stage_layers);
  if (m.gpu_layers >= 0) add("--n-gpu-layers", absl::StrCat(m.gpu_layers));
  add("--device", m.device);
  add("--vram", m.vram);
  add("--kv-type", m.kv_type);
  add("--wire", m.wire);
  add("-b", absl::StrCat(m.rows));
  add("--disk-cache", m.disk_cache);
  add("--disk-cache-limit", m.disk_cache_limit);
  add("--kv-cache-dir", m.kv_cache_dir);
  add("--kv-disk", m.kv_disk);
  add("--kv-cache-limit", m.kv_cache_limit);
  add("--hostfile", m.hostfile);
  add("--host", m.hosts);
  add("--net", m.net);
  add("--ram", m.ram);
  if (m.in_process) command.push_back("--in-process");
  if (m.allow_fewer_hosts) command.push_back("--allow-fewer-hosts");
  add("--parallel", absl::StrCat(f.parallel));
  if (m.kv_tokens > 0) add("--kv-tokens", absl::StrCat(m.kv_tokens));
  if (m.draft_max >= 0) add("--draft-max", absl::StrCat(m.draft_max));
  if (f.no_prefix_cache) command.push_back("--no-prefix-cache");
  return command;
}

absl::StatusOr<std::optional<ChatTemplate>> ParseTemplate(const std::string& source) {
  if (source.empty()) return std::optional<ChatTemplate>();
  absl::StatusOr<ChatTemplate> parsed = ChatTemplate::Parse(source);
  if (!parsed.ok()) {
    // Completions work without one.
    LogWarning(absl::StrCat("the model's chat template is of no use: ", parsed.status().message()));
    return std::optional<ChatTemplate>();
  }
  return std::optional<ChatTemplate>(*std::move(parsed));
}

// What the coordinator reads of the model: everything but its weights.
struct Model {
  std::unique_ptr<Tokenizer> tokenizer;
  std::optional<ChatTemplate> chat_template;
  std::optional<ChatTemplate> tool_use_template;
  ModelContext context;
};

absl::StatusOr<std::unique_ptr<Model>> LoadModel(const ServeFlags& f) {
  auto model = std::make_unique<Model>();
  std::string path = f.model.model;
  if (path.empty()) {
    SHOAL_ASSIGN_OR_RETURN(path, DemoModelPath());
  }
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint, OpenCheckpoint(path));
  SHOAL_ASSIGN_OR_RETURN(model->tokenizer, Tokenizer::FromCheckpoint(*checkpoint));
  SHOAL_ASSIGN_OR_RETURN(model->chat_template, ParseTemplate(model->tokenizer->chat_template()));
  SHOAL_ASSIGN_OR_RETURN(model->tool_use_template,
                         ParseTemplate(model->tokenizer->chat_template_tool_use()));
  model->context.name = !f.alias.empty() ? f.alias
                        : f.model.model.empty()
                            ? "demo"
                            : std::filesystem::path(f.model.model).stem().string();
  model->context.tokenizer = model->tokenizer.get();
  if (model->chat_template.has_value()) model->context.chat_template = &*model->chat_template;
  if (model->tool_use_template.has_value()) {
    model->context.tool_use_template = &*model->tool_use_template;
  }
  return model;
}

absl::StatusOr<ApiOptions> MakeApiOptions(const ServeFlags& f) {
  ApiOptions o;
  if (!f.key_file.empty()) {
    absl::StatusOr<ApiKeys> keys = ApiKeys::Load(f.key_file);
    if (!keys.ok()) return WithExitCode(keys.status(), kExitConfig);
    o.keys = *std::move(keys);
  }
  o.cors_origins = f.cors_origins;
  o.allowed_hosts = f.allowed_hosts;
  error_code error;
  const asio::ip::address address = asio::ip::make_address(f.http.address, error);
  if (error) {
    return UsageError(absl::StrCat("--listen ", f.http.address, " is not an IP address"));
  }
  o.loopback = address.is_loopback();
  if (!o.loopback && !o.keys.required()) {
    return WithExitCode(absl::PermissionDeniedError(absl::StrCat(
                            "--listen ", f.http.address,
                            " opens the server to other machines: give a file of keys "
                            "with --api-key-file (one key on each line), or listen on 127.0.0.1")),
                        kExitNotPermitted);
  }
  return o;
}

absl::Status CheckFlags(const ServeFlags& f) {
  absl::Status world = CheckWorldOptions(ToWorldOptions(f.model), f.model.in_process);
  if (!world.ok() && !f.model.hosts.empty()) {
    world = UsageError(
        absl::StrCat(world.message(), "; to serve at that address: --listen ", f.model.hosts));
  }
  if (!world.ok()) return world;
  if (f.parallel < 1 || f.parallel > 4096) {
    return UsageError(absl::StrCat("--parallel ", f.parallel, ": choose 1 to 4096"));
  }
  if (f.http.tls_certificate.empty() != f.http.tls_key.empty()) {
    return UsageError("--tls-cert and --tls-key go together");
  }
  if (!f.grpc.client_ca.empty() && f.http.tls_certificate.empty()) {
    return UsageError("--grpc-client-ca needs --tls-cert and --tls-key");
  }
  if (f.shutdown_timeout < 0 || f.hang_timeout < 0.5 || f.limits.requests < 1) {
    return UsageError(
        "--shutdown-timeout is 0 or more, --hang-timeout 0.5 or more, "
        "--max-requests 1 or more");
  }
  return absl::OkStatus();
}

// Each connection takes a descriptor.
void RaiseDescriptorLimit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = std::min<rlim_t>(limit.rlim_max, 65536);
  setrlimit(RLIMIT_NOFILE, &limit);
}

// Everything that lives while the command runs, in the order in which it is built.
class Service {
 public:
  Service(const ServeFlags& flags, std::unique_ptr<Model> model, ApiOptions api,
          SupervisorOptions supervisor)
      : flags_(flags),
        model_(std::move(model)),
        coordinator_(*model_->tokenizer, flags.limits, metrics_),
        supervisor_(io_, std::move(supervisor), coordinator_),
        keys_(api.keys),
        limiter_(flags.client_limits),
        api_(io_, std::move(api), model_->context, limiter_, coordinator_, supervisor_, metrics_),
        http_(io_, flags.http, api_),
        grpc_(io_, GrpcOf(flags), keys_, model_->context, limiter_, coordinator_, supervisor_),
        signals_(io_, SIGINT, SIGTERM),
        ticker_(io_) {}

  int Run() {
    coordinator_.SetLink(&supervisor_);
    coordinator_.SetOnImpossible([this](int code, const std::string& reason) {
      std::fputs(reason.c_str(), stderr);
      exit_code_ = code;
      io_.stop();
    });
    if (absl::Status s = http_.Listen(); !s.ok()) {
      return ReportError(
          s.code() == absl::StatusCode::kInvalidArgument ? WithExitCode(s, kExitConfig) : s);
    }
    if (absl::Status s = grpc_.Start(); !s.ok()) {
      // Only who asked for gRPC would rather have no server at all.
      const bool asked = flags_.grpc.port >= 0;
      if (asked || s.code() != absl::StatusCode::kUnavailable) return ReportError(s);
      LogWarning(
          absl::StrCat(s.message(), "; without --grpc-port the server goes on without gRPC"));
    }
    if (absl::Status s = supervisor_.Start(); !s.ok()) return ReportError(s);
    // Scripts wait for this line.
    if (grpc_.port() > 0) {
      std::fprintf(stderr, "shoal: gRPC on %s port %d\n", flags_.http.address.c_str(),
                   grpc_.port());
    }
    std::fprintf(stderr, "shoal: listening on %s\n", Url().c_str());
    WaitForSignal();
    Tick();
    io_.run();
    http_.Close();
    ShutdownGrpc();
    supervisor_.Stop();
    io_.restart();
    io_.poll();  // lets closed connections go
    return exit_code_;
  }

 private:
  std::string Url() const {
    const bool v6 = flags_.http.address.find(':') != std::string::npos;
    return absl::StrCat(flags_.http.tls_certificate.empty() ? "http://" : "https://", v6 ? "[" : "",
                        flags_.http.address, v6 ? "]" : "", ":", http_.port());
  }

  // Calls that end hand their last work to this thread.
  void ShutdownGrpc() {
    std::atomic<bool> done{false};
    std::thread closer([&] {
      grpc_.Shutdown();
      done = true;
    });
    while (!done) {
      io_.restart();
      io_.run_for(std::chrono::milliseconds(10));
    }
    closer.join();
  }

  // The HTTP port's neighbour, unless told otherwise.
  static GrpcOptions GrpcOf(const ServeFlags& f) {
    GrpcOptions o = f.grpc;
    o.address = f.http.address;
    o.tls_certificate = f.http.tls_certificate;
    o.tls_key = f.http.tls_key;
    if (f.no_grpc) {
      o.port = -1;
    } else if (o.port < 0) {
      o.port = f.http.port == 0 ? 0 : f.http.port + 1;
    }
    return o;
  }

  void WaitForSignal() {
    signals_.async_wait([this](error_code error, int number) {
      if (error) return;
      if (stopping_) {
        LogWarning("second signal: stopping at once");
        exit_code_ = kExitInterrupted;
        return io_.stop();
      }
      LogInfo(
          absl::StrCat("signal ", number, ": draining ", coordinator_.unfinished(), " requests"));
      stopping_ = true;
      stop_by_ = std::chrono::steady_clock::now() +
                 std::chrono::milliseconds(static_cast<int64_t>(flags_.shutdown_timeout * 1e3));
      coordinator_.Drain();
      http_.StopAccepting();
      WaitForSignal();
    });
  }

  void Tick() {
    ticker_.expires_after(kTick);
    ticker_.async_wait([this](error_code error) {
      if (error) return;
      coordinator_.Tick();
      metrics_.Streams(http_.connections());
      grpc_.SetServing(coordinator_.CheckAdmission().ok());
      if (!greeted_ && coordinator_.ready()) Greet();
      if (stopping_) {
        const bool late = std::chrono::steady_clock::now() >= stop_by_;
        if (coordinator_.unfinished() > 0 && late) {
          coordinator_.FailAll(absl::UnavailableError("the server is shutting down"));
        }
        // One more tick for what was just answered to be sent.
        if (coordinator_.unfinished() == 0 && drained_++ > 0) return io_.stop();
      }
      Tick();
    });
  }

  void Greet() {
    greeted_ = true;
    if (flags_.quiet) return;
    const engine::v1::Hello& h = coordinator_.hello();
    const std::string key = flags_.key_file.empty() ? "" : " -H 'Authorization: Bearer KEY'";
    std::fprintf(
        stderr, "%s",
        fmt::format("shoal: '{}' is ready after {:.1f} s on {} rank(s): contexts of {} tokens, {} "
                    "sequences at once, {} tokens of KV cache ({} full contexts)\n"
                    "shoal: open {}/ in a browser, or try\n"
                    "  curl {}/v1/completions{} -H 'Content-Type: application/json' "
                    "-d '{{\"prompt\": \"Once upon a time\", \"max_tokens\": 40}}'\n",
                    model_->context.name, h.load_seconds(), h.ranks_size(), h.context(), h.slots(),
                    h.kv_tokens(), h.kv_tokens() / std::max(1, h.context()), Url(), Url(), key)
            .c_str());
  }

  const ServeFlags& flags_;
  asio::io_context io_{1};
  const std::unique_ptr<Model> model_;
  Metrics metrics_;
  Coordinator coordinator_;
  Supervisor supervisor_;
  const ApiKeys keys_;
  ClientLimiter limiter_;
  OpenAiApi api_;
  HttpServer http_;
  GrpcServer grpc_;
  asio::signal_set signals_;
  asio::steady_timer ticker_;
  int exit_code_ = kExitOk;
  bool greeted_ = false;
  bool stopping_ = false;
  int drained_ = 0;
  std::chrono::steady_clock::time_point stop_by_;
};

int Serve(const ServeFlags& f) {
  ConfigureLog(f.log_json, f.quiet);
  if (absl::Status s = CheckFlags(f); !s.ok()) return ReportError(s);
  if (absl::Status s = ToEngineOptions(f.model).status(); !s.ok()) return ReportError(s);
  absl::StatusOr<ApiOptions> api = MakeApiOptions(f);
  if (!api.ok()) return ReportError(api.status());
  absl::StatusOr<std::unique_ptr<Model>> model = LoadModel(f);
  if (!model.ok()) return ReportError(model.status());
  SupervisorOptions supervisor;
  absl::StatusOr<std::vector<std::string>> command = EngineCommand(f);
  if (!command.ok()) return ReportError(command.status());
  supervisor.command = *std::move(command);
  supervisor.hang = std::chrono::milliseconds(static_cast<int64_t>(f.hang_timeout * 1e3));
  RaiseDescriptorLimit();
  signal(SIGPIPE, SIG_IGN);
  return std::make_unique<Service>(f, *std::move(model), *std::move(api), std::move(supervisor))
      ->Run();
}

void AddServeFlags(CLI::App& app, ServeFlags& f) {
  app.add_option("--listen", f.http.address, "IP address to listen on")
      ->envname("SHOAL_LISTEN")
      ->capture_default_str();
  app.add_option("--port", f.http.port, "HTTP port; 0: any that is free")
      ->envname("SHOAL_PORT")
      ->capture_default_str();
  app.add_option("--grpc-port", f.grpc.port,
                 "gRPC port; 0: any (default: the HTTP port + 1, and no gRPC when that is taken)")
      ->envname("SHOAL_GRPC_PORT");
  app.add_flag("--no-grpc", f.no_grpc, "HTTP only")->envname("SHOAL_NO_GRPC");
  app.add_flag("--grpc-reflection", f.grpc.reflection, "let gRPC clients ask for the API's shape")
      ->envname("SHOAL_GRPC_REFLECTION");
  app.add_option("--grpc-client-ca", f.grpc.client_ca,
                 "PEM file; gRPC clients must show a certificate that it signed")
      ->envname("SHOAL_GRPC_CLIENT_CA");
  app.add_option("--api-key-file", f.key_file, "file with one key (or name:key) on each line")
      ->envname("SHOAL_API_KEY_FILE");
  app.add_option("--tls-cert", f.http.tls_certificate, "PEM file with the certificate chain")
      ->envname("SHOAL_TLS_CERT");
  app.add_option("--tls-key", f.http.tls_key, "PEM file with its key")->envname("SHOAL_TLS_KEY");
  app.add_option("--alias,--served-model-name", f.alias, "the model's name in the API")
      ->envname("SHOAL_ALIAS");
  app.add_option("--parallel,--max-num-seqs", f.parallel, "sequences computed at once")
      ->envname("SHOAL_PARALLEL")
      ->capture_default_str();
  AddKvTokensFlag(app, f.model, "a full context for each sequence, or 2 GiB");
  AddDraftFlag(app, f.model, kUsualDraftText);
  app.add_flag("--no-prefix-cache", f.no_prefix_cache, "compute every prompt anew")
      ->envname("SHOAL_NO_PREFIX_CACHE");
  app.add_option("--max-requests", f.limits.requests, "requests under way, waiting ones included")
      ->envname("SHOAL_MAX_REQUESTS")
      ->capture_default_str();
  app.add_option("--max-queued-tokens", f.limits.prompt_tokens, "prompt tokens of all requests")
      ->envname("SHOAL_MAX_QUEUED_TOKENS")
      ->capture_default_str();
  app.add_option("--rate-limit", f.client_limits.requests_per_minute,
                 "requests a minute for each key; 0: no limit")
      ->envname("SHOAL_RATE_LIMIT");
  app.add_option("--max-concurrent", f.client_limits.concurrent,
                 "requests at once for each key; 0: no limit")
      ->envname("SHOAL_MAX_CONCURRENT");
  app.add_option("--cors-origin", f.cors_origins, "origin whose pages may use the API; * for any");
  app.add_option("--allowed-host", f.allowed_hosts, "further name that clients may call this host");
  app.add_option("--shutdown-timeout", f.shutdown_timeout, "seconds to finish in after SIGTERM")
      ->envname("SHOAL_SHUTDOWN_TIMEOUT")
      ->capture_default_str();
  app.add_option("--hang-timeout", f.hang_timeout,
                 "seconds after which a step may count as hanging (if 20 times the longest)")
      ->envname("SHOAL_HANG_TIMEOUT")
      ->capture_default_str();
  app.add_flag("--log-json", f.log_json, "log lines as JSON")->envname("SHOAL_LOG_JSON");
  app.add_flag("-q,--quiet", f.quiet, "warnings only");
}

}  // namespace

void AddServeCommand(CLI::App& app, CommandLine& line) {
  auto flags = std::make_shared<ServeFlags>();
  CLI::App* serve = app.add_subcommand(
      "serve", "serve a model over HTTP (OpenAI's API) and gRPC, with a web page");
  AddModelFlags(*serve, flags->model);
  AddServeFlags(*serve, *flags);
  serve->callback([flags, serve, &line] {
    flags->model.context_given = serve->get_option("--ctx-size")->count() > 0;
    line.exit_code = Serve(*flags);
  });
}

}  // namespace shoal
