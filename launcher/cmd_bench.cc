// shoal bench: prompt and generation speed, in llama-bench's words.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "comm/comm_bench.h"
#include "fmt/format.h"
#include "kernels/cpu/kernel_bench.h"
#if defined(SHOAL_CUDA)
#include "kernels/cuda/kernel_bench.h"
#endif
#include "kernels/status_macros.h"
#include "launcher/commands.h"
#include "launcher/exit_code.h"
#include "launcher/flags.h"
#include "launcher/session.h"
#include "launcher/world.h"
#include "nlohmann/json.hpp"

namespace shoal {
namespace {

using Clock = std::chrono::steady_clock;

struct BenchFlags {
  ModelFlags model;
  std::string prompts = "512";
  std::string generates = "128";
  std::string depths = "0";
  int repetitions = 5;
  int sequences = 1;
  std::string output = "md";
  bool quiet = false;
  bool kernels = false;
  bool comm = false;
  std::string kernel_types;
};

struct Test {
  int prompt = 0;
  int generate = 0;
  int depth = 0;
};

// What one run took, and what rank 0 streamed from disk meanwhile.
struct Took {
  double seconds = 0;
  int64_t bytes_read = 0;
  double read_s = 0;  // reads were in flight
  double wait_s = 0;  // the forward pass waited for them
  double cpu_s = 0;   // of the threads that read
  int64_t steps = 0;
  int64_t drafted = 0;   // tokens guessed and checked
  int64_t accepted = 0;  // of those, right
};

Took Difference(const Took& a, const Took& b) {
  return {a.seconds - b.seconds, a.bytes_read - b.bytes_read, a.read_s - b.read_s,
          a.wait_s - b.wait_s,   a.cpu_s - b.cpu_s,           a.steps - b.steps,
          a.drafted - b.drafted, a.accepted - b.accepted};
}

void Add(const Took& more, Took& sum) {
  sum.seconds += more.seconds;
  sum.bytes_read += more.bytes_read;
  sum.read_s += more.read_s;
  sum.wait_s += more.wait_s;
  sum.cpu_s += more.cpu_s;
  sum.steps += more.steps;
  sum.drafted += more.drafted;
  sum.accepted += more.accepted;
}

struct Result {
  Test test;
  std::vector<double> seconds;
  double tokens = 0;
  Took all;  // all runs together

  double AverageRate() const {
    double sum = 0;
    for (double s : seconds) sum += tokens / s;
    return sum / static_cast<double>(seconds.size());
  }
  double RateDeviation() const {
    if (seconds.size() < 2) return 0;
    const double mean = AverageRate();
    double sum = 0;
    for (double s : seconds) sum += (tokens / s - mean) * (tokens / s - mean);
    return std::sqrt(sum / static_cast<double>(seconds.size() - 1));
  }
  std::string Name() const {
    std::string name =
        test.prompt > 0 ? absl::StrCat("pp", test.prompt) : absl::StrCat("tg", test.generate);
    if (test.depth > 0) absl::StrAppend(&name, " @ d", test.depth);
    return name;
  }
};

absl::StatusOr<std::vector<int>> ParseList(const char* flag, const std::string& text) {
  std::vector<int> values;
  for (absl::string_view part : absl::StrSplit(text, ',')) {
    int v = 0;
    if (!absl::SimpleAtoi(part, &v) || v < 0 || v > 10'000'000) {
      return UsageError(absl::StrCat(flag, " ", text, ": '", part, "' is not a number of tokens"));
    }
    values.push_back(v);
  }
  return values;
}

absl::StatusOr<std::vector<Test>> MakeTests(const BenchFlags& f) {
  SHOAL_ASSIGN_OR_RETURN(const std::vector<int> prompts, ParseList("-p", f.prompts));
  SHOAL_ASSIGN_OR_RETURN(const std::vector<int> generates, ParseList("-n", f.generates));
  SHOAL_ASSIGN_OR_RETURN(const std::vector<int> depths, ParseList("-d", f.depths));
  std::vector<Test> tests;
  for (int d : depths) {
    for (int p : prompts) {
      if (p > 0) tests.push_back({p, 0, d});
    }
    for (int g : generates) {
      if (g > 0) tests.push_back({0, g, d});
    }
  }
  if (tests.empty()) return UsageError("nothing to measure: give -p or -n a number above 0");
  return tests;
}

// Bytes of weights that the ranks together read for one token: everything but the embedding's other
// rows, and of the experts only those in use.
absl::StatusOr<int64_t> BytesPerToken(const Session& session) {
  double bytes = 0;
  for (const RankPlan& plan : session.engine.rank().plan().ranks) {
    SHOAL_ASSIGN_OR_RETURN(const WeightLayout layout,
                           MakeWeightLayout(session.checkpoint, session.config, plan));
    for (const WeightUnit& u : layout.units) {
      const bool tied_head = plan.last_stage && session.config.tied_embeddings;
      if (u.kind == WeightUnit::Kind::kEmbedding && !tied_head) continue;
      const double share =
          u.kind == WeightUnit::Kind::kExpert
              ? static_cast<double>(session.config.experts_used) / session.config.experts
              : 1.0;
      bytes += static_cast<double>(u.bytes) * share;
    }
  }
  return static_cast<int64_t>(bytes);
}

// What was streamed and guessed since the weights were loaded, in `steps` steps.
Took SoFar(const Session& session, int64_t steps) {
  Took took;
  took.steps = steps;
  const Scheduler::Stats stats = session.engine.stats();
  took.drafted = stats.drafted_tokens;
  took.accepted = stats.accepted_tokens;
  const WeightStreamer* streamer = session.engine.rank().weights().streamer;
  if (streamer == nullptr) return took;
  const StreamStats s = streamer->stats();
  took.bytes_read = s.bytes_read;
  took.read_s = s.busy_s;
  took.wait_s = s.wait_s;
  took.cpu_s = s.io_cpu_s;
  return took;
}

// Runs sequences of `prompt` tokens that each draw `generate`, and returns what it took from
// `from_token` drawn tokens of every sequence to the end (0: from the start).
absl::StatusOr<Took> RunOnce(Session& session, int sequences, int prompt, int generate,
                             int from_token) {
  Engine& engine = session.engine;
  std::vector<int> drawn;
  std::vector<SequenceId> ids;
  for (int s = 0; s < sequences; ++s) {
    SequenceRequest r;
    for (int i = 0; i < prompt; ++i)
      r.tokens.push_back((i * 7919 + s * 104729 + 13) % session.config.vocab);
    r.max_tokens = generate;
    r.sampling.temperature = 0;
    SHOAL_ASSIGN_OR_RETURN(const SequenceId id, engine.Submit(std::move(r)));
    ids.push_back(id);
    drawn.push_back(0);
  }
  Clock::time_point start = Clock::now();
  int64_t steps = 0;
  Took before = SoFar(session, steps);
  int past_start = 0;
  while (!engine.idle()) {
    SHOAL_ASSIGN_OR_RETURN(const std::vector<TokenEvent> events, engine.Step());
    ++steps;
    for (const TokenEvent& e : events) {
      if (e.has_token && ++drawn[e.id - ids[0]] == from_token && ++past_start == sequences) {
        start = Clock::now();
        before = SoFar(session, steps);
      }
    }
  }
  Took took = SoFar(session, steps);
  took.seconds = std::chrono::duration<double>(Clock::now() - start).count();
  return Difference(took, before);
}

absl::StatusOr<Result> Measure(Session& session, const BenchFlags& f, const Test& t) {
  Result result;
  result.test = t;
  result.tokens = static_cast<double>(t.prompt > 0 ? t.prompt : t.generate) * f.sequences;
  for (int r = -1; r < f.repetitions; ++r) {  // the first one warms up
    Took took;
    if (t.prompt > 0) {
      // The prompt after `depth` tokens: the time of both less the time of the depth alone.
      SHOAL_ASSIGN_OR_RETURN(took, RunOnce(session, f.sequences, t.depth + t.prompt, 1, 0));
      if (t.depth > 0) {
        SHOAL_ASSIGN_OR_RETURN(const Took depth, RunOnce(session, f.sequences, t.depth, 1, 0));
        took = Difference(took, depth);
      }
    } else {
      SHOAL_ASSIGN_OR_RETURN(
          took, RunOnce(session, f.sequences, std::max(1, t.depth), t.generate + 1, 1));
    }
    if (r < 0) continue;
    result.seconds.push_back(took.seconds);
    Add(took, result.all);
  }
  return result;
}

// GB/s that bound decode, over as many bytes as a token reads, so that caches help both alike. 0
// where this process's memory says nothing about it: several ranks, weights streamed from disk.
absl::StatusOr<double> ReadBandwidth(const Session& session, const BenchFlags& f,
                                     int64_t bytes_per_token) {
  constexpr int64_t kLeast = int64_t{64} << 20, kMost = int64_t{1} << 30;
  if (f.model.tp * f.model.pp > 1 || session.engine.rank().memory().streamed > 0) return 0;
#if defined(SHOAL_CUDA)
  if (absl::StartsWith(session.engine.rank().DescribeBackend(), "cuda")) {
    // Beside a model that fills the GPU there may be no room to measure in.
    return cuda::MeasureReadBandwidth(kMost).value_or(0);
  }
#endif
  return MeasureReadBandwidth(session.options.cpu.threads,
                              std::clamp(bytes_per_token, kLeast, kMost));
}

nlohmann::ordered_json ToJson(const Session& session, const BenchFlags& f, const Result& r,
                              int64_t bytes_per_token, double read_gb_per_s) {
  nlohmann::ordered_json j;
  std::vector<double> rates, nanoseconds;
  for (double s : r.seconds) {
    rates.push_back(r.tokens / s);
    nanoseconds.push_back(std::round(s * 1e9));
  }
  double mean_ns = 0;
  for (double ns : nanoseconds) mean_ns += ns / static_cast<double>(nanoseconds.size());
  char when[32];
  const std::time_t now = std::time(nullptr);
  std::strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  j["model_filename"] = f.model.model.empty() ? "(demo model)" : f.model.model;
  j["model_type"] = absl::StrCat(session.config.architecture, " ", session.config.name);
  j["model_size"] = session.checkpoint.TotalBytes();
  j["load_seconds"] = session.load_seconds;
  j["load_gb_per_s"] =
      static_cast<double>(session.checkpoint.TotalBytes()) / session.load_seconds / 1e9;
  j["n_batch"] = session.options.rows;
  j["n_threads"] = session.options.cpu.threads;
  j["type_k"] = f.model.kv_type;
  j["type_v"] = f.model.kv_type;
  j["backend"] = session.engine.rank().DescribeBackend();
  j["tp"] = f.model.tp;
  j["pp"] = f.model.pp;
  j["ranks"] = f.model.tp * f.model.pp;
  j["n_sequences"] = f.sequences;
  j["n_prompt"] = r.test.prompt;
  j["n_gen"] = r.test.generate;
  j["n_depth"] = r.test.depth;
  j["test_time"] = when;
  j["avg_ns"] = std::llround(mean_ns);
  j["avg_ts"] = r.AverageRate();
  j["stddev_ts"] = r.RateDeviation();
  j["samples_ns"] = nanoseconds;
  j["samples_ts"] = rates;
  j["model_bytes_per_token"] = bytes_per_token;
  j["gb_per_s"] = r.test.generate > 0
                      ? r.AverageRate() / f.sequences * static_cast<double>(bytes_per_token) / 1e9
                      : 0.0;
  if (f.model.draft_max > 0 && r.test.generate > 0) {  // all repetitions together
    j["draft_max"] = f.model.draft_max;
    j["steps"] = r.all.steps;
    j["drafted"] = r.all.drafted;
    j["accepted"] = r.all.accepted;
  }
  j["read_gb_per_s"] = read_gb_per_s;
  j["share_of_reads"] = read_gb_per_s > 0 ? j["gb_per_s"].get<double>() / read_gb_per_s : 0.0;
  if (r.all.bytes_read > 0) {  // of rank 0, all repetitions together
    j["streamed"] = {{"bytes", r.all.bytes_read},
                     {"seconds", r.all.seconds},
                     {"reading_s", r.all.read_s},
                     {"waiting_s", r.all.wait_s},
                     {"cpu_s", r.all.cpu_s}};
  }
  return j;
}

void Print(const std::string& format, const std::vector<nlohmann::ordered_json>& rows,
           const std::vector<Result>& results) {
  if (format == "json") {
    std::printf("%s\n", nlohmann::ordered_json(rows).dump(2).c_str());
    return;
  }
  if (format == "csv") {
    const char* columns[] = {"model_filename",
                             "ranks",
                             "tp",
                             "pp",
                             "n_threads",
                             "n_prompt",
                             "n_gen",
                             "n_depth",
                             "n_sequences",
                             "avg_ts",
                             "stddev_ts",
                             "model_bytes_per_token",
                             "gb_per_s",
                             "read_gb_per_s",
                             "share_of_reads"};
    std::string head;
    for (const char* c : columns) absl::StrAppend(&head, head.empty() ? "" : ",", c);
    std::printf("%s\n", head.c_str());
    for (const auto& row : rows) {
      std::string text;
      for (const char* c : columns) absl::StrAppend(&text, text.empty() ? "" : ",", row[c].dump());
      std::printf("%s\n", text.c_str());
    }
    return;
  }
  std::printf(
      "| model | size | ranks | threads | test | tokens/s | GB/s | of reads |\n| --- | ---: | "
      "---: | ---: | ---: | ---: | ---: | ---: |\n");
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto& row = rows[i];
    const std::string gb =
        row["n_gen"].get<int>() > 0 ? fmt::format("{:.1f}", row["gb_per_s"].get<double>()) : "";
    const double share = row["share_of_reads"].get<double>() * 100;
    const std::string of_reads = share > 0 ? fmt::format("{:.0f} %", share) : "";
    std::printf(
        "%s\n",
        fmt::format("| {} | {:.2f} GB | {} | {} | {} | {:.2f} ± {:.2f} | {} | {} |",
                    row["model_type"].get<std::string>(), row["model_size"].get<double>() / 1e9,
                    row["ranks"].get<int>(), row["n_threads"].get<int>(), results[i].Name(),
                    row["avg_ts"].get<double>(), row["stddev_ts"].get<double>(), gb, of_reads)
            .c_str());
  }
}

absl::Status RunTests(const BenchFlags& f, const std::vector<Test>& tests, Session& session) {
  SHOAL_ASSIGN_OR_RETURN(const int64_t bytes_per_token, BytesPerToken(session));
  SHOAL_ASSIGN_OR_RETURN(const double read_gb_per_s, ReadBandwidth(session, f, bytes_per_token));
  std::vector<nlohmann::ordered_json> rows;
  std::vector<Result> results;
  for (const Test& t : tests) {
    SHOAL_ASSIGN_OR_RETURN(Result r, Measure(session, f, t));
    rows.push_back(ToJson(session, f, r, bytes_per_token, read_gb_per_s));
    if (!f.quiet && isatty(STDERR_FILENO) != 0)
      std::fprintf(stderr, "%s: %.2f tokens/s\n", r.Name().c_str(), r.AverageRate());
    results.push_back(std::move(r));
  }
  Print(f.output, rows, results);
  return absl::OkStatus();
}

std::string KernelReportJson(const KernelReport& report) {
  const MachineLimits& l = report.limits;
  nlohmann::ordered_json j;
  j["limits"] = {{"level", l.level},
                 {"threads", l.threads},
                 {"read_gb_per_s_one", l.read_gbps_one},
                 {"read_gb_per_s", l.read_gbps_all},
                 {"int8_gops", l.int8_gops},
                 {"f32_gflops", l.f32_gflops},
                 {"bf16_gflops", l.bf16_gflops}};
  j["results"] = nlohmann::ordered_json::array();
  for (const KernelResult& r : report.results) {
    j["results"].push_back({{"type", Info(r.type).name},
                            {"rows", r.rows},
                            {"cols", r.cols},
                            {"phase", r.prefill ? "prefill" : "decode"},
                            {"batch", r.batch},
                            {"seconds", r.seconds},
                            {"gb_per_s", r.gbps},
                            {"gops", r.gops},
                            {"share", r.share}});
  }
  return j.dump(1) + "\n";
}

absl::StatusOr<std::vector<DType>> ParseTypes(const std::string& names) {
  std::vector<DType> types;
  for (absl::string_view name : absl::StrSplit(names, ',', absl::SkipEmpty())) {
    const std::optional<DType> type = DTypeFromName(std::string(name));
    if (!type.has_value()) {
      return UsageError(absl::StrCat("--types: '", name, "' is none of ", KnownDTypes()));
    }
    types.push_back(*type);
  }
  return types;
}

// shoal bench --kernels --device cuda: the same of a GPU. `device`: cuda or cuda:N.
absl::Status BenchGpuKernels(const std::string& device, const std::vector<DType>& types) {
#if defined(SHOAL_CUDA)
  cuda::KernelBenchOptions options;
  options.types = types;
  if (device != "cuda" && !absl::SimpleAtoi(device.substr(5), &options.device)) {
    return UsageError(absl::StrCat("--device ", device, ": --kernels takes cpu, cuda or cuda:N"));
  }
  SHOAL_ASSIGN_OR_RETURN(const cuda::KernelReport report, cuda::BenchKernels(options, nullptr));
  std::fputs(cuda::FormatKernelReport(report).c_str(), stdout);
  return absl::OkStatus();
#else
  return absl::UnavailableError("this binary was built without CUDA: cmake --preset cuda");
#endif
}

// shoal bench --kernels: the products alone, beside what the machine can do.
int BenchKernelsAlone(const BenchFlags& f) {
  const absl::StatusOr<std::vector<DType>> types = ParseTypes(f.kernel_types);
  if (!types.ok()) return ReportError(types.status());
  if (absl::StartsWith(f.model.device, "cuda")) {
    return ReportError(BenchGpuKernels(f.model.device, *types));
  }
  KernelBenchOptions options;
  options.threads = f.model.threads;
  options.types = *types;
  const absl::StatusOr<KernelReport> report = BenchKernels(options, [](const KernelResult&) {});
  if (!report.ok()) return ReportError(report.status());
  const std::string text =
      f.output == "json" ? KernelReportJson(*report) : FormatKernelReport(*report);
  std::fputs(text.c_str(), stdout);
  return kExitOk;
}

absl::Status MeasureComm(Communicator& world, Wire wire) {
  CommBenchOptions options;
  options.wire = wire;
  if (world.rank() == 0) std::printf("%s\n", CommBenchHeader().c_str());
  return RunCommBench(world, options, [](const CommBenchRow& row) {
    std::printf("%s\n", FormatCommBenchRow(row).c_str());
    std::fflush(stdout);
  });
}

// shoal bench --comm: the all-reduce alone, over the ranks that the same flags would start for a
// model.
int BenchComm(const BenchFlags& f, const CommandLine& line) {
  const absl::StatusOr<EngineOptions> options = ToEngineOptions(f.model);
  if (!options.ok()) return ReportError(options.status());
  const int ranks = f.model.tp * f.model.pp;
  const WorldOptions world_options = ToWorldOptions(f.model);
  if (f.model.in_process || !IsMpiRank()) {
    const absl::Status fits = CheckWorldOptions(world_options, f.model.in_process);
    if (!fits.ok()) return ReportError(fits);
  }
  if (f.model.in_process) {
    auto worlds = MakeInProcessCommunicators(ranks);
    std::vector<absl::Status> statuses(ranks);
    std::vector<std::thread> threads;
    for (int r = 0; r < ranks; ++r) {
      threads.emplace_back([&, r] { statuses[r] = MeasureComm(*worlds[r], options->wire); });
    }
    for (std::thread& t : threads) t.join();
    return ReportError(statuses[0]);
  }
  absl::StatusOr<std::optional<int>> launched =
      MaybeLaunchRanks(world_options, line.argc, line.argv);
  if (!launched.ok()) return ReportError(launched.status());
  if (launched->has_value()) return **launched;
  absl::StatusOr<std::unique_ptr<Communicator>> world = OpenWorld(world_options);
  if (!world.ok()) return ReportError(world.status());
  return ReportError(MeasureComm(**world, options->wire));
}

int Bench(const BenchFlags& f, const CommandLine& line) {
  if (f.comm) return BenchComm(f, line);
  if (f.kernels) return BenchKernelsAlone(f);
  absl::StatusOr<std::vector<Test>> tests = MakeTests(f);
  if (!tests.ok()) return ReportError(tests.status());
  if (f.repetitions < 1 || f.repetitions > 10000)
    return ReportError(UsageError(absl::StrCat("-r ", f.repetitions, ": choose 1 to 10000")));
  int longest = 0;
  for (const Test& t : *tests) longest = std::max(longest, t.depth + t.prompt + t.generate + 2);
  SessionOptions options;
  options.argc = line.argc;
  options.argv = line.argv;
  options.sequences = f.sequences;
  options.prefix_cache = false;
  options.needs_tokenizer = false;
  options.quiet = f.quiet;
  options.adjust = [longest](const Checkpoint&, const ModelConfig& config,
                             EngineOptions& o) -> absl::Status {
    if (o.context == 0) o.context = longest;
    if (o.context < longest || longest > config.context) {
      return UsageError(absl::StrCat("the tests need a context of ", longest, " tokens; -c is ",
                                     o.context, " and the model was trained on ", config.context));
    }
    return absl::OkStatus();
  };
  return RunSession(
      f.model, options, [&](Session& s) { return RunTests(f, *tests, s); },
      [&f](const std::vector<RankReport>& reports) {
        if (!f.quiet) std::fputs(FormatReports(reports).c_str(), stderr);
      });
}

}  // namespace

void AddBenchCommand(CLI::App& app, CommandLine& line) {
  auto flags = std::make_shared<BenchFlags>();
  CLI::App* bench = app.add_subcommand("bench", "prompt and generation speed");
  AddModelFlags(*bench, flags->model);
  AddKvTokensFlag(*bench, flags->model, "a full context for each sequence");
  flags->model.draft_max = 0;  // its texts say nothing about how often drafts are right
  AddDraftFlag(*bench, flags->model, "0");
  bench->add_option("-p,--n-prompt", flags->prompts, "prompt lengths, such as 128,512; 0: none")
      ->capture_default_str();
  bench->add_option("-n,--n-gen", flags->generates, "tokens to generate; 0: none")
      ->capture_default_str();
  bench->add_option("-d,--n-depth", flags->depths, "tokens already in the context")
      ->capture_default_str();
  bench
      ->add_option("-r,--repetitions", flags->repetitions,
                   "runs of each test, after one that warms up")
      ->capture_default_str();
  bench->add_option("--parallel", flags->sequences, "sequences at once")->capture_default_str();
  bench->add_option("-o,--output", flags->output, "md, json or csv")
      ->check(CLI::IsMember({"md", "json", "csv"}));
  bench->add_flag("--kernels", flags->kernels,
                  "measure the matrix products of each type, and the machine's limits");
  bench->add_flag("--comm", flags->comm,
                  "measure the all-reduce between the ranks, in nccl-tests' columns");
  bench->add_option("--types", flags->kernel_types,
                    "with --kernels: only these, such as q4_0,q8_0");
  bench->add_flag("-q,--quiet", flags->quiet, "results only");
  bench->callback([flags, bench, &line] {
    flags->model.context_given = bench->get_option("--ctx-size")->count() > 0;
    line.exit_code = Bench(*flags, line);
  });
}

}  // namespace shoal
