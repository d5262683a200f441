#include "launcher/metrics.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "prometheus/counter.h"
#include "prometheus/family.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"
#include "prometheus/text_serializer.h"

namespace shoal {
namespace {

using prometheus::BuildCounter;
using prometheus::BuildGauge;
using prometheus::BuildHistogram;
using prometheus::Registry;

// vLLM's buckets.
const prometheus::Histogram::BucketBoundaries kFirstTokenBuckets{
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5,
    0.75,  1,     2.5,  5,    7.5,  10,   20,   40,  80};
const prometheus::Histogram::BucketBoundaries kTokenBuckets{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05,
                                                            0.075, 0.1,    0.15,  0.2,  0.3,   0.4,
                                                            0.5,   0.75,   1,     2.5,  5,     10};
const prometheus::Histogram::BucketBoundaries kRequestBuckets{
    0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960};

prometheus::Gauge& Gauge(Registry& r, const char* name, const char* help) {
  return BuildGauge().Name(name).Help(help).Register(r).Add({});
}
prometheus::Counter& Counter(Registry& r, const char* name, const char* help) {
  return BuildCounter().Name(name).Help(help).Register(r).Add({});
}
prometheus::Histogram& Histogram(Registry& r, const char* name, const char* help,
                                 const prometheus::Histogram::BucketBoundaries& buckets) {
  return BuildHistogram().Name(name).Help(help).Register(r).Add({}, buckets);
}

prometheus::Family<prometheus::Counter>& RankFamily(Registry& r, const char* name,
                                                    const char* help) {
  return BuildCounter().Name(name).Help(help).Register(r);
}
// A counter of the engine's that started anew with it: what came since the last report.
double Since(double last, double now) { return now < last ? now : now - last; }

}  // namespace

struct Metrics::Families {
  Registry registry;
  prometheus::Gauge& running =
      Gauge(registry, "shoal_num_requests_running", "Sequences that the engine computes");
  prometheus::Gauge& waiting =
      Gauge(registry, "shoal_num_requests_waiting", "Sequences that wait for the engine");
  prometheus::Gauge& kv_usage =
      Gauge(registry, "shoal_kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1");
  prometheus::Gauge& streams = Gauge(registry, "shoal_http_connections", "Open HTTP connections");
  prometheus::Counter& prompt_tokens =
      Counter(registry, "shoal_prompt_tokens_total", "Prompt tokens processed");
  prometheus::Counter& generation_tokens =
      Counter(registry, "shoal_generation_tokens_total", "Tokens generated");
  prometheus::Counter& prefix_queries =
      Counter(registry, "shoal_prefix_cache_queries_total", "Prompt tokens looked up");
  prometheus::Counter& prefix_hits =
      Counter(registry, "shoal_prefix_cache_hits_total", "Prompt tokens found in the prefix cache");
  prometheus::Counter& disk_tokens =
      Counter(registry, "shoal_kv_disk_hits_total",
              "Prompt tokens found in the prefix cache whose pages were read back from disk");
  prometheus::Counter& pages_written =
      Counter(registry, "shoal_kv_disk_pages_written_total", "KV pages that were sent to disk");
  prometheus::Counter& pages_lost =
      Counter(registry, "shoal_kv_disk_pages_lost_total",
              "KV pages that could not be read back and were computed again");
  prometheus::Counter& drafted_tokens =
      Counter(registry, "shoal_spec_decode_num_draft_tokens_total",
              "Tokens that were guessed ahead and checked");
  prometheus::Counter& accepted_tokens = Counter(
      registry, "shoal_spec_decode_num_accepted_tokens_total", "Of those, tokens that were right");
  prometheus::Counter& preemptions =
      Counter(registry, "shoal_num_preemptions_total", "Sequences that gave their blocks back");
  prometheus::Counter& restarts =
      Counter(registry, "shoal_engine_restarts_total", "Times the engine was lost");
  prometheus::Counter& steps = Counter(registry, "shoal_engine_steps_total", "Steps computed");
  prometheus::Counter& step_seconds =
      Counter(registry, "shoal_engine_step_seconds_total", "Time spent in steps");
  prometheus::Histogram& first_token =
      Histogram(registry, "shoal_time_to_first_token_seconds",
                "From the request to its first token", kFirstTokenBuckets);
  prometheus::Histogram& next_token = Histogram(registry, "shoal_inter_token_latency_seconds",
                                                "Between two tokens of a request", kTokenBuckets);
  prometheus::Histogram& request = Histogram(registry, "shoal_e2e_request_latency_seconds",
                                             "From the request to its last token", kRequestBuckets);
  prometheus::Family<prometheus::Counter>& ended = BuildCounter()
                                                       .Name("shoal_request_success_total")
                                                       .Help("Requests by how they ended")
                                                       .Register(registry);
  prometheus::Family<prometheus::Counter>& http =
      BuildCounter().Name("shoal_http_requests_total").Help("HTTP answers").Register(registry);
  prometheus::Family<prometheus::Counter>& rank_steps =
      RankFamily(registry, "shoal_rank_steps_total", "Steps that a rank computed");
  prometheus::Family<prometheus::Counter>& rank_step_seconds =
      RankFamily(registry, "shoal_rank_step_seconds_total", "Time that a rank spent in steps");
  prometheus::Family<prometheus::Counter>& rank_all_reduce_seconds =
      RankFamily(registry, "shoal_rank_all_reduce_wait_seconds_total",
                 "Time in sums over the tensor-parallel ranks, waiting for the others included");
  prometheus::Family<prometheus::Counter>& rank_stream_wait_seconds =
      RankFamily(registry, "shoal_rank_stream_wait_seconds_total",
                 "Time that a rank waited for weights from disk");
  prometheus::Family<prometheus::Counter>& rank_streamed_bytes = RankFamily(
      registry, "shoal_rank_streamed_bytes_total", "Bytes of weights that a rank read from disk");
  // The engine's own counters start anew with it.
  std::vector<engine::v1::RankStats> last_ranks;
  int64_t last_disk_tokens = 0;
  int64_t last_pages_written = 0;
  int64_t last_pages_lost = 0;
  int64_t last_drafted_tokens = 0;
  int64_t last_accepted_tokens = 0;
  int64_t last_preempted = 0;
  int64_t last_steps = 0;
  double last_step_seconds = 0;
};

Metrics::Metrics() : f_(std::make_unique<Families>()) {}
Metrics::~Metrics() = default;

void Metrics::FirstToken(double seconds, int prompt_tokens, int cached_tokens) {
  f_->first_token.Observe(seconds);
  f_->prompt_tokens.Increment(prompt_tokens);
  f_->prefix_queries.Increment(prompt_tokens);
  f_->prefix_hits.Increment(cached_tokens);
  f_->generation_tokens.Increment();
}

void Metrics::NextToken(double seconds) {
  f_->next_token.Observe(seconds);
  f_->generation_tokens.Increment();
}

void Metrics::RequestEnded(const std::string& reason, double seconds) {
  f_->ended.Add({{"finished_reason", reason}}).Increment();
  if (seconds >= 0) f_->request.Observe(seconds);
}

void Metrics::HttpAnswered(int status) {
  f_->http.Add({{"code", absl::StrCat(status)}}).Increment();
}

void Metrics::EngineRestarted() { f_->restarts.Increment(); }

void Metrics::Streams(int open) { f_->streams.Set(open); }

void Metrics::Heartbeat(const engine::v1::Heartbeat& h) {
  f_->running.Set(h.running());
  f_->waiting.Set(h.waiting());
  f_->kv_usage.Set(h.blocks_total() > 0 ? static_cast<double>(h.blocks_in_use()) / h.blocks_total()
                                        : 0);
  const auto add = [](prometheus::Counter& counter, auto now, auto& last) {
    counter.Increment(Since(static_cast<double>(last), static_cast<double>(now)));
    last = now;
  };
  add(f_->disk_tokens, h.disk_tokens(), f_->last_disk_tokens);
  add(f_->pages_written, h.pages_written(), f_->last_pages_written);
  add(f_->pages_lost, h.pages_lost(), f_->last_pages_lost);
  add(f_->drafted_tokens, h.drafted_tokens(), f_->last_drafted_tokens);
  add(f_->accepted_tokens, h.accepted_tokens(), f_->last_accepted_tokens);
  add(f_->preemptions, h.preempted(), f_->last_preempted);
  add(f_->steps, h.steps(), f_->last_steps);
  add(f_->step_seconds, h.step_seconds(), f_->last_step_seconds);
}

void Metrics::Ranks(const engine::v1::Stats& stats) {
  f_->last_ranks.resize(static_cast<size_t>(stats.ranks_size()));
  for (int i = 0; i < stats.ranks_size(); ++i) {
    const engine::v1::RankStats& now = stats.ranks(i);
    engine::v1::RankStats& last = f_->last_ranks[static_cast<size_t>(i)];
    const auto add = [&](prometheus::Family<prometheus::Counter>& family, auto from, auto to) {
      family.Add({{"rank", absl::StrCat(i)}})
          .Increment(Since(static_cast<double>(from), static_cast<double>(to)));
    };
    add(f_->rank_steps, last.steps(), now.steps());
    add(f_->rank_step_seconds, last.step_seconds(), now.step_seconds());
    add(f_->rank_all_reduce_seconds, last.all_reduce_seconds(), now.all_reduce_seconds());
    add(f_->rank_stream_wait_seconds, last.stream_wait_seconds(), now.stream_wait_seconds());
    add(f_->rank_streamed_bytes, last.streamed_bytes(), now.streamed_bytes());
    last = now;
  }
}

std::string Metrics::Text() const {
  return prometheus::TextSerializer().Serialize(f_->registry.Collect());
}

}  // namespace shoal
