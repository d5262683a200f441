// Random worlds against the scheduler: requests come, are cancelled, resume after a restart, run
// out of blocks and share prefixes, with several steps in flight, with pages that go to a simulated
// disk and come back from it late, or not at all, with drafts that are right, wrong from somewhere
// on, or nonsense. A simulated KV pool holds, for every position of every block, a hash of the
// whole context up to there; each row checks that everything it attends to is what its sequence
// says. SHOAL_PROPERTY_STEPS sets how many steps are simulated.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "parallel/scheduler.h"

namespace shoal {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int64_t kDefaultSteps = 200'000;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
constexpr int64_t kDefaultSteps = 200'000;
#else
constexpr int64_t kDefaultSteps = 1'000'000;
#endif
#else
constexpr int64_t kDefaultSteps = 1'000'000;
#endif

constexpr int64_t kStepsOfAWorld = 5'000;
// Steps that a sequence may take beyond those its own tokens need, while others come first.
constexpr int64_t kPatience = 20'000;

uint64_t Mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9u;
  x ^= x >> 27;
  x *= 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}
uint64_t Extend(uint64_t context, int32_t token) {
  return Mix(context * 31 + static_cast<uint64_t>(token) + 0x9E3779B97F4A7C15u);
}

class World {
 public:
  explicit World(uint64_t seed)
      : random_(seed),
        limits_(RandomLimits()),
        scheduler_(limits_, std::make_unique<Guess>(*this)) {
    stages_ = Pick(1, 4);
    pool_.assign(static_cast<size_t>(limits_.blocks) * kKvBlockTokens, 0);
    table_.assign(limits_.slots, {});
    disk_.resize(limits_.pages);
  }

  // False when a property failed.
  bool Run(int64_t steps) {
    for (int64_t i = 0; i < steps && !::testing::Test::HasFailure(); ++i) {
      const int arrivals = Pick(0, 9) == 0 ? Pick(0, 6) : 0;
      for (int a = 0; a < arrivals; ++a) Arrive();
      if (Pick(0, 40) == 0) CancelOne();
      Advance();
    }
    for (int64_t i = 0; !scheduler_.idle() || !in_flight_.empty(); ++i) {
      if (::testing::Test::HasFailure()) return false;
      EXPECT_LT(i, kPatience) << "the scheduler makes no progress";
      Advance();
    }
    TakeCancelled();
    EXPECT_TRUE(live_.empty()) << "sequences that never ended";
    EXPECT_EQ(scheduler_.stats().blocks_in_use, 0) << "blocks that never came back";
    EXPECT_EQ(scheduler_.stats().running, 0);
    EXPECT_EQ(scheduler_.stats().pages_in_use, 0) << "records that are never free again";
    EXPECT_EQ(scheduler_.loads_pending(), 0);
    return !::testing::Test::HasFailure();
  }
  int64_t streamed() const { return streamed_; }
  int64_t copied() const { return copied_; }
  int64_t drafted() const { return scheduler_.stats().drafted_tokens; }
  int64_t accepted() const { return scheduler_.stats().accepted_tokens; }

 private:
  class Guess final : public Drafter {
   public:
    explicit Guess(World& world) : world_(world) {}
    Draft Propose(SequenceId id, absl::Span<const int32_t> tokens, int most) override {
      return world_.Propose(id, tokens, most);
    }
    void Forget(SequenceId id) override { EXPECT_TRUE(world_.live_.contains(id)); }

   private:
    World& world_;
  };
  struct Live {
    std::vector<int32_t> tokens;
    std::vector<uint64_t> contexts;  // [tokens] hash of everything up to and with that token
    size_t end = 0;                  // length at which it ends
    uint64_t salt = 0;
    uint64_t seed = 0;  // of its draws
    size_t submitted = 0;
    bool cancelled = false;
    int losses = 0;  // of pages that it streams
    int64_t born = 0;
  };

  int Pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

  SchedulerLimits RandomLimits() {
    SchedulerLimits l;
    l.rows = Pick(1, 60);
    l.rows_beside_decode = Pick(1, l.rows);
    l.slots = Pick(1, 6);
    l.rows = std::max(l.rows, l.slots);
    l.context = Pick(8, 40 * kKvBlockTokens);
    l.blocks = Pick(1, 60);
    l.waiting = Pick(1, 40);
    l.prefix_cache = Pick(0, 4) != 0;
    l.draft_max = Pick(0, 1) == 0 ? 0 : Pick(1, 20);
    l.draft_adaptive = Pick(0, 1) == 0;
    l.pages = Pick(0, 2) == 0 ? 0 : Pick(1, 10);
    if (Pick(0, 3) == 0) {  // contexts larger than memory
      l.stream = true;
      l.blocks = Pick(3 * kKvPageBlocks, 5 * kKvPageBlocks);
      l.context = Pick(l.blocks * kKvBlockTokens / 2, 3 * l.blocks * kKvBlockTokens);
      l.pages = l.context / (kKvPageBlocks * kKvBlockTokens) + Pick(1, 10);
    }
    return l;
  }

  // The text of a context goes on the same way however often it is computed for a seed.
  static int32_t Draw(const Live& s) {
    return static_cast<int32_t>((s.contexts.back() + s.seed) % 5);
  }
  static void Append(Live& s, int32_t token) {
    s.contexts.push_back(Extend(s.contexts.empty() ? s.salt : s.contexts.back(), token));
    s.tokens.push_back(token);
  }

  // What comes, with a mistake here and there.
  Draft Propose(SequenceId id, absl::Span<const int32_t> tokens, int most) {
    Live s = live_.at(id);
    EXPECT_EQ(tokens, absl::MakeConstSpan(s.tokens));
    EXPECT_LE(tokens.size() + most, s.end - 1);
    Draft draft{{}, Pick(2, 12)};
    const int count = Pick(0, most);
    const int mistakes = Pick(0, 2);
    for (int i = 0; i < count; ++i) {
      Append(s, mistakes > 0 && Pick(0, 9) < 3 * mistakes ? Pick(0, 9) : Draw(s));
      draft.tokens.push_back(s.tokens.back());
    }
    return draft;
  }

  void Arrive() {
    SequenceRequest r;
    Live live;
    const int most = limits_.stream ? limits_.context
                                    : std::min(limits_.context, limits_.blocks * kKvBlockTokens);
    const int length = Pick(0, 20) == 0 ? Pick(1, 2 * most) : Pick(1, std::max(1, most / 2));
    // Few distinct texts, so that prefixes are shared.
    std::mt19937 text(static_cast<uint32_t>(Pick(0, 3)));
    for (int i = 0; i < length; ++i) r.tokens.push_back(static_cast<int32_t>(text() % 7));
    r.client = std::string(1, static_cast<char>('a' + Pick(0, 2)));
    live.salt = static_cast<uint64_t>(r.client[0]);
    r.salt = {live.salt, 0};
    r.prompt_length = Pick(0, 3) == 0 ? Pick(1, length) : length;  // shorter: after a restart
    r.max_tokens = Pick(0, 60);
    // The answers to one prompt go and end their own ways.
    const int answers = Pick(0, 3) == 0 ? Pick(2, 5) : 1;
    for (int32_t t : r.tokens) Append(live, t);
    for (int i = 1; i < answers; ++i) {
      r.max_tokens = Pick(0, 60);
      live.seed = static_cast<uint64_t>(Pick(0, 4));
      Submit(r, live, most);
    }
    Submit(std::move(r), std::move(live), most);
  }

  void Submit(SequenceRequest r, Live live, int most) {
    const auto length = static_cast<int>(r.tokens.size());
    live.end = static_cast<size_t>(std::min(r.prompt_length + r.max_tokens, most));
    live.submitted = live.tokens.size();
    live.born = step_;
    const absl::StatusOr<SequenceId> id = scheduler_.Submit(std::move(r));
    if (length > most) {
      EXPECT_EQ(id.status().code(), absl::StatusCode::kInvalidArgument);
      return;
    }
    if (!id.ok()) {
      EXPECT_EQ(id.status().code(), absl::StatusCode::kResourceExhausted);
      EXPECT_GE(scheduler_.stats().waiting, limits_.waiting);
      return;
    }
    live_[*id] = std::move(live);
  }

  void CancelOne() {
    if (live_.empty()) return;
    auto it = live_.begin();
    std::advance(it, Pick(0, static_cast<int>(live_.size()) - 1));
    it->second.cancelled = true;
    scheduler_.Cancel(it->first);
  }

  void Advance() {
    ++step_;
    while (in_flight_.size() < static_cast<size_t>(stages_)) {
      if (scheduler_.loads_pending() > 0 && Pick(0, 2) == 0) FinishLoads();
      std::optional<Scheduler::Step> step = scheduler_.Next();
      if (!step.has_value() && scheduler_.loads_pending() > 0 && in_flight_.empty()) {
        FinishLoads();
        step = scheduler_.Next();
      }
      if (!step.has_value()) break;
      Compute(step->batch);
      in_flight_.push_back(*std::move(step));
      if (Pick(0, 2) == 0) break;
    }
    TakeCancelled();
    if (in_flight_.empty()) return;
    const Scheduler::Step step = std::move(in_flight_.front());
    in_flight_.pop_front();
    if (step.streams) {
      scheduler_.StreamFailed(unreadable_);
      unreadable_.clear();
    }
    std::vector<int32_t> tokens;
    for (size_t i = 0; i < step.sequences.size(); ++i) {
      Live& s = live_.at(step.sequences[i]);
      const bool useless = s.cancelled || scheduler_.Find(step.sequences[i])->lost;
      const bool of_draft = i > 0 && step.sequences[i - 1] == step.sequences[i];
      // What the row was computed for is what was drawn from the row before.
      const bool wrong =
          of_draft && (useless || step.batch.tokens[step.batch.logits[i].row] != tokens.back());
      tokens.push_back(wrong ? Scheduler::kNoToken : Draw(s));
      if (!useless && !wrong) Append(s, tokens.back());
    }
    for (const Scheduler::Finished& f : scheduler_.Complete(step, tokens)) Finish(f);
    std::erase_if(garbage_, [this](SequenceId id) {
      const Sequence* s = scheduler_.Find(id);
      return s == nullptr || s->slot < 0;  // it starts over
    });
    for (const auto& [id, s] : live_) {
      EXPECT_LT(step_ - s.born, kPatience) << "sequence " << id << " starves";
    }
  }

  void TakeCancelled() {
    for (const Scheduler::Finished& f : scheduler_.TakeCancelled()) Finish(f);
  }

  void Finish(const Scheduler::Finished& f) {
    const auto it = live_.find(f.id);
    ASSERT_NE(it, live_.end()) << "sequence " << f.id << " ended twice";
    const Live& s = it->second;
    if (f.reason == FinishReason::kCancelled) {
      EXPECT_TRUE(s.cancelled);
    } else if (f.reason == FinishReason::kError) {
      EXPECT_GT(s.losses, 3);
    } else {
      EXPECT_EQ(f.reason, FinishReason::kLength);
      // At its end, or beyond it from the start (it came back from a restart with all its tokens,
      // or its prompt fills the context and one more token is drawn).
      EXPECT_GE(s.tokens.size(), s.end);
      EXPECT_LE(s.tokens.size(), std::max(s.end, s.submitted + 1));
    }
    live_.erase(it);
  }

  // What the ranks do with a batch, with hashes of contexts in place of keys and values.
  void Compute(const Batch& batch) {
    ASSERT_TRUE(batch.rows() > 0 || !batch.pages.empty());
    for (const Batch::PageOp& op : batch.pages) RunPage(op);
    ASSERT_LE(batch.rows(), limits_.rows);
    for (const Batch::TableEntry& e : batch.table) {
      if (e.block <= Batch::kOnDisk) {
        ASSERT_TRUE(limits_.stream && e.index % kKvPageBlocks == 0);
        ASSERT_LT(Batch::kOnDisk - e.block, limits_.pages);
        std::vector<int>& blocks = table_[e.slot];
        blocks.resize(std::max<size_t>(blocks.size(), e.index + kKvPageBlocks), -1);
        std::fill_n(blocks.begin() + e.index, kKvPageBlocks, e.block);
        continue;
      }
      ASSERT_TRUE(e.slot >= 0 && e.slot < limits_.slots && e.block >= 0 &&
                  e.block < limits_.blocks);
      std::vector<int>& blocks = table_[e.slot];
      if (static_cast<size_t>(e.index) >= blocks.size()) blocks.resize(e.index + 1, -1);
      blocks[e.index] = e.block;
    }
    int row = 0;
    bool prefill_began = false;
    std::set<int> slots;
    for (const Batch::Run& run : batch.runs) {
      ASSERT_TRUE(slots.insert(run.slot).second) << "a slot twice in a batch";
      ASSERT_EQ(run.row, row);
      ASSERT_FALSE(run.decode != 0 && prefill_began) << "decode rows come first";
      prefill_began = run.decode == 0;
      row += run.rows;
      Stream(run);
      Store(batch, run);
      if (::testing::Test::HasFatalFailure()) return;
    }
    ASSERT_EQ(row, batch.rows());
    for (const Batch::Run& run : batch.runs) Attend(run);
  }

  void RunPage(const Batch::PageOp& op) {
    if (op.kind == Batch::PageOp::Kind::kCopy) {
      ASSERT_TRUE(op.blocks[0] >= 0 && op.blocks[0] < limits_.blocks);
      ASSERT_TRUE(op.blocks[1] >= 0 && op.blocks[1] < limits_.blocks);
      std::copy_n(&pool_[size_t(op.blocks[0]) * kKvBlockTokens], kKvBlockTokens,
                  &pool_[size_t(op.blocks[1]) * kKvBlockTokens]);
      ++copied_;
      return;
    }
    ASSERT_TRUE(op.record >= 0 && op.record < limits_.pages && op.count >= 1 &&
                op.count <= kKvPageBlocks);
    Page& page = disk_[op.record];
    if (op.kind == Batch::PageOp::Kind::kLoad) {
      ASSERT_TRUE(Holds(page, op)) << "a page that is not there";
      loads_.push_back(op);
      for (int i = 0; i < op.count; ++i) {
        if (op.blocks[i] < 0) continue;
        std::fill_n(&pool_[size_t(op.blocks[i]) * kKvBlockTokens], kKvBlockTokens, 0xDEAD);
      }
      return;
    }
    page = {{op.prefix, op.prefix + op.count}, {}};
    for (int i = 0; i < op.count; ++i) {
      ASSERT_TRUE(op.blocks[i] >= 0 && op.blocks[i] < limits_.blocks);
      const uint64_t* block = &pool_[size_t(op.blocks[i]) * kKvBlockTokens];
      page.contexts.insert(page.contexts.end(), block, block + kKvBlockTokens);
    }
  }
  // What was on disk when the load began must be there still, and its blocks nobody else's.
  void FinishLoads() {
    std::vector<bool> worked;
    for (const Batch::PageOp& op : loads_) {
      const Page& page = disk_[op.record];
      EXPECT_TRUE(Holds(page, op));
      worked.push_back(Pick(0, 9) != 0);
      for (int i = 0; i < op.count; ++i) {
        if (op.blocks[i] < 0) continue;
        uint64_t* block = &pool_[size_t(op.blocks[i]) * kKvBlockTokens];
        for (int t = 0; t < kKvBlockTokens; ++t) {
          EXPECT_EQ(block[t], 0xDEADu) << "a block that is being loaded was used";
          block[t] = worked.back() ? page.contexts[size_t(i) * kKvBlockTokens + t] : 0xBAD;
        }
      }
    }
    loads_.clear();
    scheduler_.FinishLoads(worked);
    scheduler_.SetCosts({.page_s = 1.0 * Pick(0, 3),
                         .token_s = 0.01 * Pick(0, 3),
                         .decode_s = 0.1 * Pick(0, 3),
                         .step_s = 0.1 * Pick(0, 3),
                         .draft_row_s = 0.02 * Pick(-1, 3),
                         .draft_age = Pick(-1, 50)});
  }

  const Live* Owner(const Batch::Run& run) const {
    for (const auto& [id, live] : live_) {
      const Sequence* sequence = scheduler_.Find(id);  // null: its end is not told yet
      if (sequence != nullptr && sequence->slot == run.slot) return &live;
    }
    return nullptr;
  }

  // Reads the pages that are on disk only, or fails to.
  void Stream(const Batch::Run& run) {
    for (int page = 0; page * kKvPageBlocks * kKvBlockTokens < run.pos; ++page) {
      const int block = table_[run.slot].at(static_cast<size_t>(page) * kKvPageBlocks);
      if (block > Batch::kOnDisk) return;
      ++streamed_;
      if (Pick(0, 60) != 0) continue;
      const SequenceId id = OwnerId(run);
      unreadable_.push_back(Batch::kOnDisk - block);
      if (garbage_.insert(id).second) ++live_.at(id).losses;
    }
  }
  SequenceId OwnerId(const Batch::Run& run) const {
    for (const auto& [id, live] : live_) {
      if (&live == Owner(run)) return id;
    }
    return 0;
  }

  // Every layer stores the keys and values of all rows before any row attends.
  void Store(const Batch& batch, const Batch::Run& run) {
    const Live* s = Owner(run);
    ASSERT_NE(s, nullptr) << "a run of nobody";
    ASSERT_LE(static_cast<size_t>(run.pos + (run.decode != 0 ? 1 : run.rows)), s->tokens.size());
    const int drafted = std::max(0, run.pos + run.rows - static_cast<int>(s->tokens.size()));
    ASSERT_LE(drafted, limits_.draft_max);
    uint64_t context = 0;  // with the tokens of the draft
    for (int p = run.pos; p < run.pos + run.rows; ++p) {
      const int32_t token = batch.tokens[run.row + p - run.pos];
      const bool known = static_cast<size_t>(p) < s->tokens.size();
      ASSERT_TRUE(!known || token == s->tokens[p]);
      context = known ? s->contexts[p] : Extend(context, token);
      ASSERT_GE(BlockOf(run.slot, p), 0) << "a position to write that is on disk only";
      pool_[At(run.slot, p)] = garbage_.contains(OwnerId(run)) ? 0xBAD : context;
    }
  }
  void Attend(const Batch::Run& run) {
    const Live& s = *Owner(run);
    if (garbage_.contains(OwnerId(run))) return;  // its result is thrown away
    const int end = std::min(run.pos + run.rows, static_cast<int>(s.tokens.size()));
    for (int p = 0; p < end; ++p) {
      const int block = BlockOf(run.slot, p);
      const int in_page = p % (kKvPageBlocks * kKvBlockTokens);
      const uint64_t there = block > Batch::kOnDisk
                                 ? pool_[At(run.slot, p)]
                                 : disk_[Batch::kOnDisk - block].contexts.at(in_page);
      ASSERT_EQ(there, s.contexts[p])
          << "position " << p << " of " << end << " holds another context";
    }
  }

  int BlockOf(int slot, int position) const {
    return table_[slot].at(static_cast<size_t>(position) / kKvBlockTokens);
  }
  size_t At(int slot, int position) {
    const std::vector<int>& blocks = table_[slot];
    const size_t index = static_cast<size_t>(position) / kKvBlockTokens;
    EXPECT_TRUE(index < blocks.size() && blocks[index] >= 0) << "position without a block";
    const int block = index < blocks.size() ? std::max(0, blocks[index]) : 0;
    return static_cast<size_t>(block) * kKvBlockTokens + position % kKvBlockTokens;
  }

  std::mt19937_64 random_;
  const SchedulerLimits limits_;
  std::map<SequenceId, Live> live_;
  Scheduler scheduler_;
  int stages_ = 1;
  int64_t step_ = 0;
  std::vector<uint64_t> pool_;
  std::vector<std::vector<int>> table_;
  struct Page {
    std::vector<KvName> prefix;
    std::vector<uint64_t> contexts;
  };
  static bool Holds(const Page& page, const Batch::PageOp& op) {
    return page.prefix.size() >= static_cast<size_t>(op.count) &&
           std::equal(op.prefix, op.prefix + op.count, page.prefix.begin());
  }
  std::vector<Page> disk_;
  std::vector<int> unreadable_;   // records that steps in flight could not read
  std::set<SequenceId> garbage_;  // whose steps in flight are therefore of no use
  int64_t streamed_ = 0;          // pages read for steps
  int64_t copied_ = 0;            // blocks that two sequences would have written to
  std::vector<Batch::PageOp> loads_;
  std::deque<Scheduler::Step> in_flight_;
};

TEST(SchedulerProperty, RandomWorlds) {
  const char* asked = std::getenv("SHOAL_PROPERTY_STEPS");
  const int64_t steps = asked == nullptr ? kDefaultSteps : std::atoll(asked);
  int64_t streamed = 0, copied = 0, drafted = 0, accepted = 0;
  for (int64_t done = 0, seed = 1; done < steps; done += kStepsOfAWorld, ++seed) {
    World world(static_cast<uint64_t>(seed));
    ASSERT_TRUE(world.Run(kStepsOfAWorld)) << "seed " << seed;
    streamed += world.streamed();
    copied += world.copied();
    drafted += world.drafted();
    accepted += world.accepted();
  }
  EXPECT_TRUE((streamed > 0 && copied > 0) || steps < kDefaultSteps);
  EXPECT_GT(accepted, steps / 100);
  EXPECT_GT(drafted - accepted, steps / 100);
}

// The same calls give the same steps.
TEST(SchedulerProperty, Deterministic) {
  const auto trace = [] {
    Scheduler scheduler(
        {.rows = 24, .rows_beside_decode = 8, .slots = 3, .context = 100, .blocks = 9});
    std::mt19937 random(5);
    std::vector<int32_t> trace;
    for (int i = 0; i < 400; ++i) {
      if (random() % 3 == 0) {
        SequenceRequest r;
        r.tokens.resize(1 + random() % 50);
        for (int32_t& t : r.tokens) t = static_cast<int32_t>(random() % 3);
        r.max_tokens = static_cast<int>(random() % 30);
        r.client = std::string(1, static_cast<char>('a' + random() % 3));
        scheduler.Submit(std::move(r)).IgnoreError();
      }
      const auto step = scheduler.Next();
      if (!step.has_value()) continue;
      for (const Batch::Run& run : step->batch.runs) {
        trace.insert(trace.end(), {run.slot, run.row, run.rows, run.pos, run.decode});
      }
      for (const Batch::TableEntry& e : step->batch.table) {
        trace.insert(trace.end(), {e.slot, e.index, e.block});
      }
      scheduler.Complete(*step, std::vector<int32_t>(step->sequences.size(), 1));
    }
    return trace;
  };
  EXPECT_EQ(trace(), trace());
}

}  // namespace
}  // namespace shoal
