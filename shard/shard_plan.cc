#include "shard/shard_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/packed_matrix.h"
#include "kernels/status_macros.h"
#include "shard/tensor_names.h"

namespace shoal {
namespace {

constexpr int kMaxTp = 1024;
constexpr int64_t kSuperBlock = 256;  // a K-quant row is best cut between super-blocks

using Sizes = std::vector<int64_t>;

// Largest-remainder apportionment of `units`, at least one each. REQUIRES: units >= shares.size().
Sizes Apportion(int64_t units, const std::vector<double>& shares) {
  const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
  const size_t n = shares.size();
  std::vector<double> ideal(n);
  Sizes sizes(n);
  int64_t given = 0;
  for (size_t i = 0; i < n; ++i) {
    ideal[i] = static_cast<double>(units) * (shares[i] / sum);
    sizes[i] = std::min(units - given, static_cast<int64_t>(ideal[i]));
    given += sizes[i];
  }
  const auto lack = [&](size_t i) { return ideal[i] - static_cast<double>(sizes[i]); };
  for (; given < units; ++given) {
    size_t best = 0;
    for (size_t i = 1; i < n; ++i) {
      if (lack(i) > lack(best) + 1e-9) best = i;
    }
    ++sizes[best];
  }
  for (size_t i = 0; i < n; ++i) {
    if (sizes[i] > 0) continue;
    size_t richest = i;  // the one that has most above its share, and more than one
    for (size_t j = 0; j < n; ++j) {
      if (sizes[j] > 1 && (richest == i || lack(j) < lack(richest))) richest = j;
    }
    --sizes[richest];
    ++sizes[i];
  }
  return sizes;
}

// The extents of cutting [0, total) at multiples of `granule`; none when somebody would get
// nothing.
std::optional<std::vector<Extent>> Cut(int64_t total, int64_t granule,
                                       const std::vector<double>& shares) {
  const int64_t units = (total + granule - 1) / granule;
  if (units < static_cast<int64_t>(shares.size())) return std::nullopt;
  std::vector<Extent> extents;
  int64_t unit = 0;
  for (const int64_t size : Apportion(units, shares)) {
    extents.push_back({unit * granule, std::min(total, (unit + size) * granule)});
    unit += size;
  }
  return extents;
}

// The best cut among granules, coarsest first: the one whose slowest rank, cost(extent) / share, is
// fastest. A finer granule must win by more than rounding.
template <typename Cost>
std::vector<Extent> BestCut(int64_t total, const std::vector<int64_t>& granules,
                            const std::vector<double>& shares, const Cost& cost) {
  std::vector<Extent> best;
  double best_cost = std::numeric_limits<double>::infinity();
  for (const int64_t granule : granules) {
    std::optional<std::vector<Extent>> extents = Cut(total, granule, shares);
    if (!extents) continue;
    double worst = 0;
    for (size_t i = 0; i < shares.size(); ++i) {
      worst = std::max(worst, cost((*extents)[i]) / shares[i]);
    }
    if (best.empty() || worst < best_cost * (1 - 1e-6)) {
      best = *std::move(extents);
      best_cost = worst;
    }
  }
  return best;
}

// What the tensors' types allow.
struct Granules {
  int64_t heads = 1;  // query heads: attn_output's columns are cut there
  int64_t ffn = 1;    // ffn_down's columns
};

Granules FindGranules(const ModelConfig& config, const Checkpoint& checkpoint) {
  int64_t o_cut = 1, down_cut = 1;
  for (int layer = 0; layer < config.layers; ++layer) {
    for (const TensorSpec& spec : LayerTensors(config, layer)) {
      const TensorInfo* t = checkpoint.FindTensor(spec.name);
      if (t == nullptr) continue;
      if (spec.role == Role::kO) o_cut = std::max<int64_t>(o_cut, Info(t->type).cut_elems);
      if (spec.role == Role::kDown || spec.role == Role::kSharedDown) {
        down_cut = std::max<int64_t>(down_cut, Info(t->type).cut_elems);
      }
    }
    for (int e = 0; e < config.experts; ++e) {
      const ExpertSource s = FindExpert(checkpoint, config, Role::kDown, layer, e);
      if (s.tensor == nullptr) continue;
      down_cut = std::max<int64_t>(down_cut, Info(s.tensor->type).cut_elems);
      if (s.tensor->matrices() > 1) break;  // stacked: one type for all
    }
  }
  // cut_elems are 1 or 32, so the larger one is a multiple of the others.
  return {o_cut / std::gcd(o_cut, int64_t{config.head_dim}), down_cut};
}

int64_t Units(int64_t total, int64_t granule) { return (total + granule - 1) / granule; }

absl::Status CheckTp(const ModelConfig& config, const Granules& g, const ShardRequest& request) {
  const int64_t heads = Units(config.heads, g.heads);
  int columns = config.ffn;  // the fewest of an FFN
  for (const int n : {config.dense_ffn, config.shared_ffn}) {
    if (n > 0) columns = std::min(columns, n);
  }
  const int64_t ffn = Units(columns, g.ffn);
  const int64_t most = std::min({heads, ffn, int64_t{config.vocab}, int64_t{kMaxTp}});
  if (request.tp < 1 || request.tp > most) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor parallelism of ", request.tp, " was asked for, this model allows 1 to ", most,
        ": its ", config.heads, " query heads can be cut into ", heads, " runs (multiples of ",
        g.heads, "), its ", columns, " FFN columns into ", ffn, " (multiples of ", g.ffn,
        "), its vocabulary into ", config.vocab, " rows",
        request.tp > most ? "; use pipeline stages (--pp) for the other ranks" : ""));
  }
  if (request.pp < 1 || request.pp > config.layers) {
    return absl::InvalidArgumentError(absl::StrCat(request.pp,
                                                   " pipeline stages were asked for, this model "
                                                   "allows 1 to ",
                                                   config.layers, ", one for each layer"));
  }
  if (!request.split.empty() && static_cast<int>(request.split.size()) != request.tp) {
    return absl::InvalidArgumentError(
        absl::StrCat("the split ", absl::StrJoin(request.split, ","), " has ", request.split.size(),
                     " shares, expected ", request.tp, ", one for each tensor-parallel rank"));
  }
  for (const double share : request.split) {
    if (!(share > 0 && share <= 1e9 && share >= 1e-9)) {
      return absl::InvalidArgumentError(
          absl::StrCat("the split ", absl::StrJoin(request.split, ","), " has the share ", share,
                       ", expected positive numbers, as in 3,1"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckStages(const ModelConfig& config, const ShardRequest& request) {
  const std::vector<int>& layers = request.stage_layers;
  if (!layers.empty() &&
      (static_cast<int>(layers.size()) != request.pp ||
       *std::min_element(layers.begin(), layers.end()) < 1 ||
       std::accumulate(layers.begin(), layers.end(), int64_t{0}) != config.layers)) {
    return absl::InvalidArgumentError(
        absl::StrCat("the stages have ", absl::StrJoin(layers, ","), " layers, expected ",
                     request.pp, " numbers from 1 that make up the model's ", config.layers));
  }
  const std::vector<double>& shares = request.stage_shares;
  if (!shares.empty() && (static_cast<int>(shares.size()) != request.pp ||
                          !std::all_of(shares.begin(), shares.end(),
                                       [](double s) { return s > 0 && std::isfinite(s); }))) {
    return absl::InvalidArgumentError(absl::StrCat("the stages have the shares ",
                                                   absl::StrJoin(shares, ","), ", expected ",
                                                   request.pp, " positive numbers"));
  }
  return absl::OkStatus();
}

Extent KvHeadsOf(const Extent& q, int group) {
  return {q.begin / group, (q.end + group - 1) / group};
}

// Bytes of each layer, then what the first and the last stage hold besides.
struct StageBytes {
  std::vector<double> layers;
  double first = 0;
  double last = 0;
};

StageBytes CountBytes(const ModelConfig& config, const Checkpoint& checkpoint) {
  StageBytes bytes;
  const auto add = [&](const TensorInfo* t, double& to) {
    if (t != nullptr) to += static_cast<double>(t->bytes);
  };
  const std::vector<TensorSpec> globals = GlobalTensors(config);
  for (const TensorSpec& spec : globals) {
    add(checkpoint.FindTensor(spec.name), spec.role == Role::kEmbedding ? bytes.first : bytes.last);
  }
  if (config.tied_embeddings) bytes.last += bytes.first;
  bytes.layers.resize(config.layers);
  for (int layer = 0; layer < config.layers; ++layer) {
    for (const TensorSpec& spec : LayerTensors(config, layer)) {
      if (spec.first_row == 0) add(checkpoint.FindTensor(spec.name), bytes.layers[layer]);
    }
    for (const Role role : {Role::kGate, Role::kUp, Role::kDown}) {
      for (int e = 0; e < config.experts; ++e) {
        const ExpertSource s = FindExpert(checkpoint, config, role, layer, e);
        add(s.tensor, bytes.layers[layer]);
        if (s.tensor != nullptr && s.tensor->matrices() > 1) break;
      }
    }
  }
  return bytes;
}

std::vector<Extent> StagesOf(const std::vector<int>& layers) {
  std::vector<Extent> extents;
  int64_t begin = 0;
  for (const int n : layers) {
    extents.push_back({begin, begin + n});
    begin += n;
  }
  return extents;
}

// Contiguous runs of layers, one for each share: the stage that is heaviest for its share is as
// light as can be, and under that the sum of squares is least (so that stages of equal layers come
// out equal). Dynamic programming over best[s][l] = the first l layers in s stages.
std::vector<Extent> BalanceStages(const StageBytes& bytes, const std::vector<double>& shares) {
  const int stages = static_cast<int>(shares.size());
  const int layers = static_cast<int>(bytes.layers.size());
  std::vector<double> prefix(layers + 1, 0);
  for (int l = 0; l < layers; ++l) prefix[l + 1] = prefix[l] + bytes.layers[l];
  const auto weight = [&](int stage, int begin, int end) {
    return (prefix[end] - prefix[begin] + (stage == 0 ? bytes.first : 0) +
            (stage == stages - 1 ? bytes.last : 0)) /
           shares[stage];
  };
  constexpr double kNever = std::numeric_limits<double>::infinity();
  std::vector<std::vector<int>> from(stages, std::vector<int>(layers + 1, 0));
  const auto solve = [&](const auto& combine) {
    std::vector<double> best(layers + 1, kNever), next(layers + 1);
    best[0] = 0;
    for (int s = 0; s < stages; ++s) {
      std::fill(next.begin(), next.end(), kNever);
      for (int end = s + 1; end <= layers - (stages - 1 - s); ++end) {
        for (int begin = s; begin < end; ++begin) {
          const double cost = combine(best[begin], weight(s, begin, end));
          if (cost < next[end]) {
            next[end] = cost;
            from[s][end] = begin;
          }
        }
      }
      std::swap(best, next);
    }
    return best[layers];
  };
  const double heaviest = solve([](double a, double b) { return std::max(a, b); });
  solve([&](double a, double b) { return b > heaviest ? kNever : a + b * b; });
  std::vector<Extent> extents(stages);
  int64_t end = layers;
  for (int s = stages - 1; s >= 0; --s) {
    extents[s] = {from[s][end], end};
    end = from[s][end];
  }
  return extents;
}

bool Unequal(const std::vector<double>& shares) {
  const auto [least, most] = std::minmax_element(shares.begin(), shares.end());
  return *most > *least * 1.1;
}

}  // namespace

void BalanceByMemory(const std::vector<int64_t>& bytes, bool split_too, ShardRequest& request) {
  const int tp = request.tp, pp = request.pp;
  // With equal shares a stage is full when its smallest rank is.
  std::vector<double> stages(pp, std::numeric_limits<double>::infinity());
  std::vector<double> split(tp, std::numeric_limits<double>::infinity());
  std::vector<double> together(pp, 0.0);
  for (int stage = 0; stage < pp; ++stage) {
    for (int i = 0; i < tp; ++i) {
      const double b = static_cast<double>(bytes[stage * tp + i]);
      stages[stage] = std::min(stages[stage], b);
      split[i] = std::min(split[i], b);
      together[stage] += b;
    }
  }
  if (split_too) {
    stages = together;
    if (Unequal(split)) request.split = split;
  }
  if (request.stage_layers.empty() && Unequal(stages)) request.stage_shares = stages;
}

absl::StatusOr<ShardPlan> MakeShardPlan(const ModelConfig& config, const Checkpoint& checkpoint,
                                        const ShardRequest& request) {
  const Granules g = FindGranules(config, checkpoint);
  SHOAL_RETURN_IF_ERROR(CheckTp(config, g, request));
  SHOAL_RETURN_IF_ERROR(CheckStages(config, request));
  const std::vector<double> shares =
      request.split.empty() ? std::vector<double>(request.tp, 1.0) : request.split;
  const auto padded_rows = [](const Extent& e) {
    return static_cast<double>(Units(e.size(), kPanelRows) * kPanelRows);
  };

  // Runs that end between KV heads cost no replicated KV cache; take them when they are as well
  // balanced.
  const int group = config.group();
  const std::vector<Extent> q_heads =
      BestCut(config.heads, {std::lcm(g.heads, int64_t{group}), g.heads}, shares,
              [&](const Extent& q) {  // q and o rows, k and v rows
                return static_cast<double>(q.size() + KvHeadsOf(q, group).size());
              });
  std::vector<int64_t> ffn_granules = {std::max(g.ffn, int64_t{kPanelRows}), g.ffn};
  if (g.ffn > 1) ffn_granules.insert(ffn_granules.begin(), kSuperBlock);
  const auto cut_ffn = [&](int columns) {
    return columns == 0 ? std::vector<Extent>(request.tp)
                        : BestCut(columns, ffn_granules, shares, padded_rows);
  };
  const std::vector<Extent> ffn = cut_ffn(config.ffn), dense_ffn = cut_ffn(config.dense_ffn),
                            shared_ffn = cut_ffn(config.shared_ffn);
  const std::vector<Extent> vocab = BestCut(config.vocab, {kPanelRows, 1}, shares, padded_rows);
  const std::vector<Extent> stages =
      !request.stage_layers.empty()
          ? StagesOf(request.stage_layers)
          : BalanceStages(CountBytes(config, checkpoint), request.stage_shares.empty()
                                                              ? std::vector<double>(request.pp, 1.0)
                                                              : request.stage_shares);

  ShardPlan plan;
  plan.tp = request.tp;
  plan.pp = request.pp;
  for (int stage = 0; stage < request.pp; ++stage) {
    for (int i = 0; i < request.tp; ++i) {
      RankPlan r;
      r.rank = stage * request.tp + i;
      r.stage = stage;
      r.tp_index = i;
      r.layers = stages[stage];
      r.q_heads = q_heads[i];
      r.kv_heads = KvHeadsOf(q_heads[i], group);
      r.ffn = ffn[i];
      r.dense_ffn = dense_ffn[i];
      r.shared_ffn = shared_ffn[i];
      r.vocab = vocab[i];
      r.first_stage = stage == 0;
      r.last_stage = stage == request.pp - 1;
      plan.ranks.push_back(r);
    }
  }
  return plan;
}

}  // namespace shoal
