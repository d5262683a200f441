#include "parallel/model.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/status_macros.h"

namespace shoal {

namespace {
constexpr int kHiddenTag = 1;  // hidden states between stages
}

// Weights of one unit, readable while this lives.
class Model::Unit {
 public:
  Unit(WeightSource& source, int index, const WeightUnit& unit, const uint8_t* base)
      : source_(&source), index_(index), unit_(&unit), base_(base) {}
  Unit(Unit&& other) noexcept
      : source_(std::exchange(other.source_, nullptr)),
        index_(other.index_),
        unit_(other.unit_),
        base_(other.base_) {}
  Unit(const Unit&) = delete;
  Unit& operator=(const Unit&) = delete;
  Unit& operator=(Unit&&) = delete;
  ~Unit() {
    if (source_ != nullptr) source_->Release(index_);
  }

  const uint8_t* base() const { return base_; }
  PackedMatrix matrix(Role role) const {
    const WeightExtent* e = unit_->Find(role);
    SHOAL_CHECK(e != nullptr, "the layout holds every matrix that the config implies");
    return {e->shape, base_ + e->offset};
  }
  const float* vector(Role role) const {  // null when the model has none
    const WeightExtent* e = unit_->Find(role);
    return e == nullptr ? nullptr : reinterpret_cast<const float*>(base_ + e->offset);
  }

 private:
  WeightSource* source_;
  int index_;
  const WeightUnit* unit_;
  const uint8_t* base_;
};

// The experts of a layer as the backend takes them.
class Model::ExpertTables {
 public:
  explicit ExpertTables(int experts) {
    for (auto& m : matrices_) m.resize(experts);
  }
  // `base` null: a shape only.
  void Set(int expert, const WeightUnit& unit, const uint8_t* base) {
    constexpr Role kMatrices[] = {Role::kGate, Role::kUp, Role::kDown};
    constexpr Role kBiases[] = {Role::kGateBias, Role::kUpBias, Role::kDownBias};
    for (int i = 0; i < 3; ++i) {
      const WeightExtent* e = unit.Find(kMatrices[i]);
      matrices_[i][expert] = {e->shape, base == nullptr ? nullptr : base + e->offset};
      const WeightExtent* bias = unit.Find(kBiases[i]);
      if (bias == nullptr) continue;
      biases_[i].resize(matrices_[i].size());
      if (base != nullptr) {
        biases_[i][expert] = reinterpret_cast<const float*>(base + bias->offset);
      }
    }
  }
  ExpertWeights view(Activation activation) const {
    return {matrices_[0], matrices_[1], matrices_[2], biases_[0],
            biases_[1],   biases_[2],   activation};
  }

 private:
  std::vector<PackedMatrix> matrices_[3];  // gate, up, down; as the biases
  std::vector<const float*> biases_[3];    // empty where the units have none
};

absl::Status Model::Forward(const Batch& batch) {
  SHOAL_RETURN_IF_ERROR(PrepareRuns(batch));
  const int64_t hidden_bytes =
      int64_t{rows_.total()} * config_.dim * static_cast<int64_t>(sizeof(float));
  if (!plan_.first_stage) {
    SHOAL_RETURN_IF_ERROR(mesh_.pipeline().Recv(x_, hidden_bytes, mesh_.previous(), kHiddenTag));
  }
  if (IsDecodeStep(batch)) {
    const auto ids = absl::MakeConstSpan(local_ids_).first(plan_.first_stage ? batch.rows() : 0);
    DecodeStep step = {segments_, ids, RowsOfStep()};
    if (mesh_.tp().size() > 1) step.agree = [this](bool mine) { return mesh_.AllAgree(mine); };
    SHOAL_RETURN_IF_ERROR(backend_.Step(step, [&](int rows) {
      rows_.decode = rows;
      return RunLayers(batch);
    }));
  } else {
    SHOAL_RETURN_IF_ERROR(RunLayers(batch));
  }
  if (!streamed_.empty()) pager_->EndStream();
  if (!plan_.last_stage) return mesh_.pipeline().Send(x_, hidden_bytes, mesh_.next(), kHiddenTag);
  KeepLogitRows(batch);
  return backend_.Check();
}

absl::Status Model::RunLayers(const Batch& batch) {
  if (plan_.first_stage) SHOAL_RETURN_IF_ERROR(Embed(batch));
  for (int64_t layer = plan_.layers.begin; layer < plan_.layers.end; ++layer) {
    SHOAL_RETURN_IF_ERROR(Attention(static_cast<int>(layer)));
    SHOAL_RETURN_IF_ERROR(FeedForward(static_cast<int>(layer)));
  }
  return absl::OkStatus();
}

// x = embedding of each token; a rank contributes the rows of its part of the vocabulary.
absl::Status Model::Embed(const Batch& batch) {
  const auto ids = absl::MakeConstSpan(local_ids_).first(batch.rows());
  SHOAL_ASSIGN_OR_RETURN(const uint8_t* rows, weights_.AcquireRows(embedding_unit_, ids));
  const Unit w(weights_, embedding_unit_, layout_.units[embedding_unit_], rows);
  backend_.Embed(w.matrix(Role::kEmbedding), absl::MakeSpan(local_ids_).first(batch.rows()),
                 config_.embedding_scale, x_);
  // One rank's row and zeros from the others: exact only in f32.
  return mesh_.tp().AllReduceSum(x_, int64_t{rows_.total()} * config_.dim, Wire::kF32);
}

// x += o(attention(rope(q), rope(k), v)), q k v = norm(x), through the norm behind it where there
// is one; left in partial_ where the FFN is parallel
absl::Status Model::Attention(int layer) {
  SHOAL_ASSIGN_OR_RETURN(const Unit w, Get(WeightUnit::Kind::kAttention, layer));
  const AttentionShape heads = HeadsOf(layer, w.vector(Role::kSinks));
  const PackedMatrix q = w.matrix(Role::kQ), k = w.matrix(Role::kK), v = w.matrix(Role::kV);
  const int64_t qw = q.shape.rows, kw = k.shape.rows, width = qw + kw + v.shape.rows;
  float *q_out = qkv_, *k_out = qkv_ + qw, *v_out = qkv_ + qw + kw;

  SHOAL_RETURN_IF_ERROR(ColumnLinear(backend_, Norm(x_, w.vector(Role::kAttnNorm)), config_.dim,
                                     rows_,
                                     {{&q, w.vector(Role::kQBias), q_out, width, false},
                                      {&k, w.vector(Role::kKBias), k_out, width, false},
                                      {&v, w.vector(Role::kVBias), v_out, width, false}}));

  const float* squares = nullptr;
  if (config_.qk_norm == QkNorm::kRowRms) {
    SHOAL_ASSIGN_OR_RETURN(squares, SquaresOfRows(static_cast<int>(qw), static_cast<int>(kw)));
  }
  const RopeTable rope = rope_.view(config_.window_of(layer) > 0);
  const bool rotates = config_.rotates(layer);
  const KvLayer kv = kv_.layer(layer - static_cast<int>(plan_.layers.begin));
  if (!streamed_.empty()) backend_.BeginBatch();  // the ops below have segments of their own
  backend_.QkvToCache(
      {.q = q_out,
       .k = k_out,
       .v = v_out,
       .stride = width,
       .norm = rotates || config_.qk_norm != QkNorm::kPlain ? config_.qk_norm : QkNorm::kHeadRms,
       .q_norm = w.vector(Role::kQNorm),
       .k_norm = w.vector(Role::kKNorm),
       .eps = config_.norm_eps,
       .squares = squares,
       .q_cols = config_.heads * config_.head_dim,
       .k_cols = config_.kv_heads * config_.head_dim,
       .q_scale = config_.has_temperature(layer) ? rope_.temperatures() : nullptr,
       .rope = rotates ? &rope : nullptr},
      heads, kv, segments_);
  if (!streamed_.empty()) backend_.BeginBatch();
  if (!in_memory_.empty()) backend_.Attention(q_out, width, heads, kv, in_memory_, attended_, qw);
  for (const Streamed& s : streamed_) {
    SHOAL_RETURN_IF_ERROR(AttendStreamed(s, layer, heads, q_out, width, attended_, qw));
  }

  const LinearInput attended = LinearInput::Plain(attended_, qw);
  const PackedMatrix o = w.matrix(Role::kO);
  if (config_.parallel_ffn) {  // which adds its part to this, and sums both
    backend_.Linear(attended, static_cast<int>(qw), rows_,
                    {{&o, w.vector(Role::kOBias), partial_, config_.dim, false}});
    return absl::OkStatus();
  }
  return RowLinear(backend_, mesh_.tp(), wire_, attended, static_cast<int>(qw), rows_, o,
                   w.vector(Role::kOBias), Sum(w.vector(Role::kAttnPostNorm)));
}

// What norms of whole rows divide by: the squares of all heads of q and of k, on all ranks. A KV
// head that several ranks hold counts on the one where its first query head is.
absl::StatusOr<const float*> Model::SquaresOfRows(int q_cols, int k_cols) {
  const bool begun_before = plan_.q_heads.begin % config_.group() != 0;
  const int own = q_cols + (begun_before ? config_.head_dim : 0);
  backend_.SumSquares(qkv_, q_cols + 2 * k_cols, {{0, q_cols}, {own, q_cols + k_cols}},
                      rows_.total(), squares_);
  SHOAL_RETURN_IF_ERROR(mesh_.tp().AllReduceSum(squares_, int64_t{2} * rows_.total(), Wire::kF32));
  return squares_;
}

AttentionShape Model::HeadsOf(int layer, const float* sinks) const {
  AttentionShape heads = heads_;
  heads.window = config_.window_of(layer);
  heads.chunked = config_.chunked;
  heads.sinks = sinks;
  return heads;
}

// A window's rows do not see the pages before it.
int Model::FirstPage(const Streamed& s, int layer) const {
  const int visible = HeadsOf(layer, nullptr).FirstVisible(segments_[s.segment].pos);
  return std::min(s.pages, visible / (kKvPageBlocks * kKvBlockTokens));
}

// Says in which order the pass at hand will ask for pages, so that they are read ahead.
void Model::AnnounceStream() {
  if (streamed_.empty()) return;
  std::vector<KvPager::StreamPart> parts;
  const int first_layer = static_cast<int>(plan_.layers.begin);
  for (int layer = first_layer; layer < static_cast<int>(plan_.layers.end); ++layer) {
    for (const Streamed& s : streamed_) {
      for (int page = FirstPage(s, layer); page < s.pages; ++page) {
        parts.push_back({kv_.RecordOf(s.slot, page), layer - first_layer});
      }
    }
  }
  pager_->BeginStream(parts);
}

// The pages of this layer pass through the window, and attention sees them beside the blocks in
// memory as if they had always been there.
absl::Status Model::AttendStreamed(const Streamed& s, int layer, const AttentionShape& heads,
                                   const float* q, int64_t q_stride, float* out,
                                   int64_t out_stride) {
  const int local_layer = layer - static_cast<int>(plan_.layers.begin);
  const int first_page = FirstPage(s, layer);
  Segment segment = segments_[s.segment];
  const int32_t* table = kv_.table(s.slot);
  flat_table_.assign((segment.pos + segment.rows + kKvBlockTokens - 1) / kKvBlockTokens, -1);
  for (int page = first_page; page < s.pages; ++page) {
    const int window_page = page - first_page;
    // Without it rank 0 will throw the result away: attention to whatever the window holds.
    if (const uint8_t* part = pager_->NextPart()) {
      SHOAL_RETURN_IF_ERROR(kv_.ToWindow(window_page, part));
    }
    for (int b = 0; b < kKvPageBlocks; ++b) {
      flat_table_[page * kKvPageBlocks + b] = kv_.WindowBlock(window_page * kKvPageBlocks + b);
    }
  }
  for (int b = s.pages * kKvPageBlocks; b < static_cast<int>(flat_table_.size()); ++b) {
    flat_table_[b] = kv_.FlatBlock(local_layer, table[b]);
  }
  segment.blocks = flat_table_.data();
  backend_.BeginBatch();
  backend_.Attention(q, q_stride, heads, kv_.FlatLayer(), {segment}, out, out_stride);
  return kv_.WindowIsRead();
}

absl::Status Model::FeedForward(int layer) {
  return config_.has_experts(layer) ? MixtureOfExperts(layer) : Mlp(layer);
}

// x += down(activation(gate(n), up(n))), n = norm(x)
absl::Status Model::Mlp(int layer) {
  SHOAL_ASSIGN_OR_RETURN(const Unit w, Get(WeightUnit::Kind::kFfn, layer));
  const PackedMatrix gate = w.matrix(Role::kGate), up = w.matrix(Role::kUp),
                     down = w.matrix(Role::kDown);
  const FfnWeights ffn = {&gate, &up, config_.activation};
  const LinearInput input = Norm(x_, w.vector(Role::kFfnNorm));
  float* up_out = gate_ + int64_t{limits_.rows} * gate.shape.rows;
  if (config_.parallel_ffn) {  // beside attention's part
    backend_.Ffn(input, config_.dim, rows_, ffn, gate_, up_out,
                 {&down, nullptr, partial_, config_.dim, true});
    return ReduceInto(backend_, mesh_.tp(), wire_, Sum(nullptr), rows_.total(), config_.dim);
  }
  return ParallelFfn(backend_, mesh_.tp(), wire_, input, config_.dim, rows_, ffn, down, gate_,
                     up_out, Sum(w.vector(Role::kFfnPostNorm)));
}

// partial += the FFN that every token takes beside its experts
absl::Status Model::AddSharedExpert(int layer, const LinearInput& input) {
  SHOAL_ASSIGN_OR_RETURN(const Unit w, Get(WeightUnit::Kind::kFfn, layer));
  const PackedMatrix gate = w.matrix(Role::kSharedGate), up = w.matrix(Role::kSharedUp),
                     down = w.matrix(Role::kSharedDown);
  backend_.Ffn(input, config_.dim, rows_, {&gate, &up, config_.activation}, gate_,
               gate_ + int64_t{limits_.rows} * gate.shape.rows,
               {&down, nullptr, partial_, config_.dim, true});
  return absl::OkStatus();
}

// x += sum over a token's experts of weight * mlp_e(norm(x)). Every rank holds a slice of every
// expert.
absl::Status Model::MixtureOfExperts(int layer) {
  SHOAL_ASSIGN_OR_RETURN(const Unit w, Get(WeightUnit::Kind::kRouter, layer));
  const LinearInput input = Norm(x_, w.vector(Role::kFfnNorm));
  const PackedMatrix router = w.matrix(Role::kRouter);
  backend_.Linear(input, config_.dim, rows_,
                  {{&router, w.vector(Role::kRouterBias), router_, config_.experts, false}});
  RouterArgs route;
  route.logits = router_;
  route.experts = config_.experts;
  route.used = config_.experts_used;
  route.renormalize = config_.renormalize_experts;
  route.sigmoid = config_.sigmoid_router;
  route.choice_bias = w.vector(Role::kChoiceBias);
  route.scale = config_.expert_scale;
  route.groups = config_.expert_groups;
  route.groups_used = config_.expert_groups_used;
  backend_.Route(route, rows_.total(), expert_ids_, expert_weights_);

  // Where a layer's experts all stay in place, nobody here needs to know which were chosen.
  const ExpertTables* tables = fixed_experts_[layer - plan_.layers.begin].get();
  ExpertTables chosen(tables == nullptr ? config_.experts : 0);
  std::vector<Unit> held;  // until the product is done
  if (tables == nullptr) {
    SHOAL_RETURN_IF_ERROR(HoldChosenExperts(layer, chosen, held));
    tables = &chosen;
  }
  LinearInput weighted = input;
  const float* weights = expert_weights_;
  if (config_.weigh_expert_input) weighted.row_scale = std::exchange(weights, nullptr);
  backend_.Experts(weighted, config_.dim, rows_, expert_ids_, weights, config_.experts_used,
                   tables->view(config_.activation), partial_, config_.dim);
  if (config_.shared_ffn > 0) SHOAL_RETURN_IF_ERROR(AddSharedExpert(layer, input));
  return ReduceInto(backend_, mesh_.tp(), wire_, Sum(nullptr), rows_.total(), config_.dim);
}

// Waits for the router, and gets the experts that it chose from where they are.
absl::Status Model::HoldChosenExperts(int layer, ExpertTables& tables, std::vector<Unit>& held) {
  std::vector<bool> used(config_.experts, false);
  const int choices = rows_.total() * config_.experts_used;
  const auto* ids = static_cast<const int32_t*>(
      backend_.OnHost(expert_ids_, choices * static_cast<int64_t>(sizeof(int32_t))));
  for (int i = 0; i < choices; ++i) used[ids[i]] = true;
  std::vector<int> chosen;
  for (int e = 0; e < config_.experts; ++e) {
    if (used[e]) chosen.push_back(IndexOf(WeightUnit::Kind::kExpert, layer, e));
  }
  weights_.Prefetch(chosen);
  for (int e = 0; e < config_.experts; ++e) {
    const WeightUnit& layout = layout_.units[IndexOf(WeightUnit::Kind::kExpert, layer, e)];
    const uint8_t* base = nullptr;  // experts that no row chose have a shape only
    if (used[e]) {
      SHOAL_ASSIGN_OR_RETURN(Unit expert, Get(WeightUnit::Kind::kExpert, layer, e));
      base = expert.base();
      held.push_back(std::move(expert));
    }
    tables.Set(e, layout, base);
  }
  return absl::OkStatus();
}

absl::Status Model::Head(const float* hidden, int n, bool prefill) {
  SHOAL_CHECK(plan_.last_stage && n <= limits_.logit_rows,
              "the head runs on the last stage, in slices");
  SHOAL_ASSIGN_OR_RETURN(const Unit w, Get(WeightUnit::Kind::kHead, -1));
  // With tied embeddings a rank that holds the embedding rows reads them as its head.
  const bool tied = layout_.units[head_unit_].Find(Role::kHead) == nullptr;
  const WeightUnit::Kind kind = tied ? WeightUnit::Kind::kEmbedding : WeightUnit::Kind::kHead;
  SHOAL_ASSIGN_OR_RETURN(const Unit table, Get(kind, -1));
  const PackedMatrix head = table.matrix(tied ? Role::kEmbedding : Role::kHead);
  LinearInput input = Norm(OnDevice(hidden, n), w.vector(Role::kOutputNorm));
  input.scale = config_.logit_scale;
  backend_.Linear(input, config_.dim, prefill ? RowCount{0, n} : RowCount{n, 0},
                  {{&head, nullptr, logits_.as<float>(), vocab_rows(), false}});
  return absl::OkStatus();
}

// Rows of `hidden` for the device: those of the latest batch are still where they came from.
const float* Model::OnDevice(const float* hidden, int n) {
  const auto kept = static_cast<int64_t>(kept_from_.size()) * config_.dim;
  if (!std::less<>()(hidden, kept_) && std::less<>()(hidden, kept_ + kept)) {
    const auto first = kept_from_.begin() + (hidden - kept_) / config_.dim;
    bool adjacent = true;
    for (int i = 1; i < n; ++i) adjacent = adjacent && first[i] == first[0] + i;
    if (adjacent) return x_ + int64_t{first[0]} * config_.dim;
    AwaitKeptRows();
  }
  return static_cast<const float*>(
      backend_.OnDevice(hidden, int64_t{n} * config_.dim * static_cast<int64_t>(sizeof(float))));
}

const float* Model::Logits(int n) {
  return static_cast<const float*>(
      backend_.OnHost(logits_.data(), int64_t{n} * vocab_rows() * int64_t{sizeof(float)}));
}

bool Model::ReduceLogits(absl::Span<const LogitRequest> requests, int candidates,
                         LogitSummary* summaries, LogitCandidate* best) {
  return backend_.ReduceLogits(logits_.as<float>(), vocab_rows(),
                               static_cast<int32_t>(plan_.vocab.begin), requests, candidates,
                               summaries, best);
}

absl::Status Model::FinalNorm(const float* hidden, float* out) {
  SHOAL_ASSIGN_OR_RETURN(const Unit w, Get(WeightUnit::Kind::kHead, -1));
  const int64_t bytes = config_.dim * static_cast<int64_t>(sizeof(float));
  backend_.Norm(Norm(OnDevice(hidden, 1), w.vector(Role::kOutputNorm)), 1, config_.dim, partial_,
                config_.dim);
  backend_.Copy(out, partial_, bytes);
  return absl::OkStatus();
}

// Everything below prepares for the pass above.

int Model::IndexOf(WeightUnit::Kind kind, int layer, int expert) const {
  if (kind == WeightUnit::Kind::kEmbedding) return embedding_unit_;
  if (kind == WeightUnit::Kind::kHead) return head_unit_;
  const std::vector<int>& units = units_of_layer_[layer - plan_.layers.begin];
  if (kind == WeightUnit::Kind::kAttention) return units[0];
  if (kind == WeightUnit::Kind::kExpert) return units[FirstExpert() + expert];
  return units[kind == WeightUnit::Kind::kFfn && config_.has_experts(layer) ? 2 : 1];
}

// The index of a layer's first expert among its units: attention, router, and the FFN beside them.
int Model::FirstExpert() const { return config_.shared_ffn > 0 ? 3 : 2; }

absl::StatusOr<Model::Unit> Model::Get(WeightUnit::Kind kind, int layer, int expert) {
  const int index = IndexOf(kind, layer, expert);
  SHOAL_ASSIGN_OR_RETURN(const uint8_t* base, weights_.Acquire(index));
  return Unit(weights_, index, layout_.units[index], base);
}

absl::Status Model::PrepareRuns(const Batch& batch) {
  if (batch.rows() > limits_.rows || batch.decode_rows < 0 || batch.decode_rows > batch.rows()) {
    return absl::InternalError(
        absl::StrCat("a batch of ", batch.rows(), " rows (", batch.decode_rows,
                     " decode) was sent to a model made for ", limits_.rows));
  }
  SHOAL_RETURN_IF_ERROR(kv_.Apply(batch.table));
  backend_.BeginBatch();
  rows_ = {batch.decode_rows, batch.rows() - batch.decode_rows};
  segments_.clear();
  in_memory_.clear();
  streamed_.clear();
  for (const Batch::Run& run : batch.runs) {
    SHOAL_RETURN_IF_ERROR(kv_.CheckRun(run, batch.rows()));
    segments_.push_back({run.row, run.rows, run.pos, kv_.table(run.slot), run.decode != 0});
    if (const int pages = kv_.PagesOnDisk(run.slot); pages > 0) {
      streamed_.push_back({run.slot, static_cast<int>(segments_.size()) - 1, pages});
    } else {
      in_memory_.push_back(segments_.back());
    }
  }
  AnnounceStream();
  for (int i = 0; i < batch.rows(); ++i) {
    const bool mine = batch.tokens[i] >= plan_.vocab.begin && batch.tokens[i] < plan_.vocab.end;
    local_ids_[i] = mine ? batch.tokens[i] - static_cast<int32_t>(plan_.vocab.begin) : -1;
  }
  for (const Batch::LogitRow& l : batch.logits) {
    if (l.row < 0 || l.row >= batch.rows())
      return absl::InternalError("a logit row lies outside its batch");
  }
  return absl::OkStatus();
}

// Most rows of a step whose sums between ranks only enqueue.
int Model::RowsOfStep() const {
  return static_cast<int>(std::min<int64_t>(mesh_.recordable_sum() / config_.dim, limits_.rows));
}

// Whether the pass is the same ops over other rows each time: nothing streamed, so that the host
// need not know which experts were chosen, and no sums between ranks that the host takes part in.
bool Model::IsDecodeStep(const Batch& batch) const {
  return batch.decode_rows == batch.rows() && segments_.size() == in_memory_.size() &&
         static_cast<int>(segments_.size()) == batch.rows() && batch.rows() <= RowsOfStep() &&
         all_fixed_;
}

absl::Status Model::FindFixedWeights() {
  fixed_experts_.resize(units_of_layer_.size());
  all_fixed_ = !plan_.first_stage || weights_.fixed(embedding_unit_);
  const auto fixed = [this](int unit) { return weights_.fixed(unit); };
  for (size_t i = 0; i < units_of_layer_.size(); ++i) {
    const std::vector<int>& units = units_of_layer_[i];
    all_fixed_ = all_fixed_ && std::all_of(units.begin(), units.end(), fixed);
    const int layer = static_cast<int>(plan_.layers.begin) + static_cast<int>(i);
    if (!config_.has_experts(layer)) continue;
    const int first = FirstExpert();
    if (!std::all_of(units.begin() + first, units.end(), fixed)) continue;
    auto tables = std::make_unique<ExpertTables>(config_.experts);
    for (int e = 0; e < config_.experts; ++e) {
      SHOAL_ASSIGN_OR_RETURN(const Unit w, Get(WeightUnit::Kind::kExpert, layer, e));
      tables->Set(e, layout_.units[units[first + e]], w.base());
    }
    fixed_experts_[i] = std::move(tables);
  }
  return absl::OkStatus();
}

void Model::KeepLogitRows(const Batch& batch) {
  kept_from_.clear();
  for (const Batch::LogitRow& l : batch.logits) kept_from_.push_back(l.row);
  const size_t floats = batch.logits.size() * config_.dim;
  kept_ = kept_staging_.as<float>();
  if (static_cast<int64_t>(floats * sizeof(float)) > kept_staging_.size()) {  // or none at all
    kept_own_.resize(floats);
    kept_ = kept_own_.data();
  }
  const int64_t row_bytes = config_.dim * static_cast<int64_t>(sizeof(float));
  size_t n = 0;
  for (size_t i = 0; i < batch.logits.size(); i += n) {  // rows side by side in one copy
    for (n = 1; i + n < batch.logits.size() &&
                batch.logits[i + n].row == batch.logits[i].row + static_cast<int32_t>(n);) {
      ++n;
    }
    backend_.Download(kept_ + i * config_.dim, x_ + int64_t{batch.logits[i].row} * config_.dim,
                      static_cast<int64_t>(n) * row_bytes);
  }
}

Model::Model(const ModelConfig& config, const WeightLayout& layout, const ModelLimits& limits,
             Wire wire, const Mesh& mesh, Backend& backend, WeightSource& weights, KvCache& kv,
             KvPager* pager)
    : config_(config),
      layout_(layout),
      limits_(limits),
      wire_(wire),
      mesh_(mesh),
      plan_(mesh.plan()),
      backend_(backend),
      weights_(weights),
      kv_(kv),
      pager_(pager) {
  heads_.q_heads = static_cast<int>(plan_.q_heads.size());
  heads_.head_dim = config.head_dim;
  heads_.q_head_begin = static_cast<int>(plan_.q_heads.begin);
  heads_.kv_head_begin = static_cast<int>(plan_.kv_heads.begin);
  heads_.group = config.group();
  heads_.scale = 1.0f / std::sqrt(static_cast<float>(config.score_dim()));
  units_of_layer_.resize(plan_.layers.size());
  for (size_t i = 0; i < layout.units.size(); ++i) {
    const WeightUnit& u = layout.units[i];
    if (u.layer >= 0) units_of_layer_[u.layer - plan_.layers.begin].push_back(static_cast<int>(i));
    if (u.kind == WeightUnit::Kind::kEmbedding) embedding_unit_ = static_cast<int>(i);
    if (u.kind == WeightUnit::Kind::kHead) head_unit_ = static_cast<int>(i);
  }
}

Model::~Model() = default;

absl::StatusOr<std::unique_ptr<Model>> Model::Create(
    const ModelConfig& config, const WeightLayout& layout, const ModelLimits& limits, Wire wire,
    const Mesh& mesh, Backend& backend, WeightSource& weights, KvCache& kv, KvPager* pager) {
  std::unique_ptr<Model> model(
      new Model(config, layout, limits, wire, mesh, backend, weights, kv, pager));
  SHOAL_RETURN_IF_ERROR(backend.Reserve(BackendLimits(config, mesh.plan(), limits)));
  SHOAL_ASSIGN_OR_RETURN(model->rope_, RopeTables::Create(backend, config, limits.context));
  SHOAL_RETURN_IF_ERROR(model->Allocate());
  SHOAL_RETURN_IF_ERROR(model->FindFixedWeights());
  return model;
}

Backend::Limits Model::BackendLimits(const ModelConfig& config, const RankPlan& plan,
                                     const ModelLimits& limits) {
  const int q_width = static_cast<int>(plan.q_heads.size()) * config.head_dim;
  const int ffn = static_cast<int>(plan.ffn.size());
  const int widest =
      static_cast<int>(std::max({plan.ffn.size(), plan.dense_ffn.size(), plan.shared_ffn.size()}));
  Backend::Limits b;
  b.rows = limits.rows;
  b.cols = std::max({config.dim, q_width, widest});
  b.out_rows = std::max({config.dim, q_width, widest, static_cast<int>(plan.vocab.size())});
  b.heads = static_cast<int>(plan.q_heads.size());
  b.head_dim = config.head_dim;
  b.context = limits.context;
  b.experts_used = config.experts_used;
  b.expert_cols = config.experts > 0 ? ffn : 0;
  if (plan.last_stage) {
    b.logit_rows = limits.logit_rows;
    b.vocab = static_cast<int>(plan.vocab.size());
  }
  return b;
}

namespace {

struct Sizes {
  int64_t x, qkv, squares, attended, ffn, router, experts;
};

Sizes ActivationSizes(const ModelConfig& c, const RankPlan& plan, const ModelLimits& limits) {
  const int64_t rows = limits.rows, q = plan.q_heads.size() * c.head_dim,
                kv = plan.kv_heads.size() * c.head_dim;
  const int64_t ffn =
      c.experts > 0 ? std::max(plan.dense_ffn.size(), plan.shared_ffn.size()) : plan.ffn.size();
  const auto aligned = [](int64_t floats) { return (floats + 15) / 16 * 16; };
  const int64_t squares = c.qk_norm == QkNorm::kRowRms ? 2 * rows : 0;
  return {aligned(rows * c.dim),
          aligned(rows * (q + 2 * kv)),
          aligned(squares),
          aligned(rows * q),
          aligned(2 * rows * ffn),
          aligned(rows * c.experts),
          aligned(rows * c.experts_used)};
}

}  // namespace

int64_t Model::ActivationBytes(const ModelConfig& config, const RankPlan& plan,
                               const ModelLimits& limits) {
  const Sizes s = ActivationSizes(config, plan, limits);
  return (2 * s.x + s.qkv + s.squares + s.attended + s.ffn + s.router + 2 * s.experts) *
         static_cast<int64_t>(sizeof(float));
}

absl::Status Model::Allocate() {
  const Sizes s = ActivationSizes(config_, plan_, limits_);
  SHOAL_ASSIGN_OR_RETURN(storage_, backend_.Allocate(ActivationBytes(config_, plan_, limits_)));
  if (plan_.last_stage) {
    SHOAL_ASSIGN_OR_RETURN(logits_, backend_.Allocate(int64_t{limits_.logit_rows} * vocab_rows() *
                                                      static_cast<int64_t>(sizeof(float))));
    if (!backend_.shares_host_memory()) {
      SHOAL_ASSIGN_OR_RETURN(kept_staging_,
                             backend_.AllocateStaging(int64_t{limits_.rows} * config_.dim *
                                                      static_cast<int64_t>(sizeof(float))));
    }
  }
  float* next = storage_.as<float>();
  const auto take = [&next](int64_t floats) { return std::exchange(next, next + floats); };
  x_ = take(s.x);
  partial_ = take(s.x);
  qkv_ = take(s.qkv);
  squares_ = take(s.squares);
  attended_ = take(s.attended);
  gate_ = take(s.ffn);
  router_ = take(s.router);
  expert_weights_ = take(s.experts);
  expert_ids_ = reinterpret_cast<int32_t*>(take(s.experts));
  local_ids_.resize(limits_.rows);
  return absl::OkStatus();
}

}  // namespace shoal
