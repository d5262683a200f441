// A rank's KV pages on disk: which file is theirs, and what a batch says about them.
#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/status_macros.h"
#include "parallel/rank.h"
#include "shard/source_fingerprint.h"

namespace shoal {
namespace {

constexpr int kPageTag = 3;

// What a rank says of the pages it was to stream. More than these fail again.
struct StreamFailures {
  int32_t count = 0;
  int32_t records[15] = {};
};

// What a rank has in one record. Ranks send how many they have, then the list.
struct Listed {
  int64_t record = 0;
  int64_t blocks = 0;
  KvName prefix[kKvPageBlocks] = {};
};
static_assert(sizeof(Listed) == 272);

std::vector<Listed> ListPages(const std::vector<KvRecord>& found) {
  std::vector<Listed> list;
  for (size_t r = 0; r < found.size(); ++r) {
    if (found[r].blocks() == 0) continue;
    Listed& l = list.emplace_back();
    l.record = static_cast<int64_t>(r);
    l.blocks = found[r].blocks();
    std::copy(found[r].prefix.begin(), found[r].prefix.end(), l.prefix);
  }
  return list;
}

// Pages serve again where all that makes their bytes is the same: the model, the ranks' shares of
// it, the type.
absl::StatusOr<KvName> FileKey(const Checkpoint& checkpoint, const ModelConfig& config,
                               const EngineOptions& options, const ShardPlan& plan, int rank) {
  SHOAL_ASSIGN_OR_RETURN(const uint64_t model, SourceFingerprint(checkpoint));
  std::string text = absl::StrCat(
      "kv ", kKvFileVersion, " model ", model, " type ", static_cast<int>(options.kv_type),
      " wire ", static_cast<int>(options.wire), " rank ", rank, " window ", config.window);
  if (config.window_period > 0) absl::StrAppend(&text, " of ", config.window_period);
  for (const RankPlan& r : plan.ranks) {
    absl::StrAppend(&text, " [", r.layers.begin, "-", r.layers.end, " ", r.kv_heads.begin, "-",
                    r.kv_heads.end, " ", r.q_heads.begin, "-", r.q_heads.end, "]");
  }
  const XXH128_hash_t h = XXH3_128bits(text.data(), text.size());
  return KvName{h.low64, h.high64};
}

}  // namespace

absl::Status Rank::OpenPager(const Checkpoint& checkpoint) {
  page_records_ = KvPageRecords(config_, options_, plan_);
  if (page_records_ == 0) {
    if (options_.kv_disk.bytes == 0) return absl::OkStatus();
    const bool by_folder = options_.kv_disk.dir_bytes_max > 0 &&
                           options_.kv_disk.dir_bytes_max < options_.kv_disk.bytes;
    return absl::InvalidArgumentError(
        absl::StrCat(by_folder ? options_.kv_disk.dir_bytes_max : options_.kv_disk.bytes,
                     " bytes on disk do not hold one KV page of each rank: give more (",
                     by_folder ? "--kv-cache-limit" : "--kv-disk", ")"));
  }
  const RankPlan& plan = mesh_->plan();
  KvPager::Options o;
  o.file.dir = options_.kv_disk.dir;
  o.file.keep = options_.kv_disk.keep;
  o.file.dir_bytes_max = options_.kv_disk.dir_bytes_max;
  if (o.file.keep) {
    SHOAL_ASSIGN_OR_RETURN(o.file.key, FileKey(checkpoint, config_, options_, plan_, plan.rank));
  }
  o.file.shape = {static_cast<int>(plan.layers.size()), kv_->layer(0).shape.block_bytes()};
  o.file.records = page_records_;
  o.warn = options_.kv_disk.warn;
  SHOAL_ASSIGN_OR_RETURN(pager_, KvPager::Open(o, *kv_));
  return absl::OkStatus();
}

absl::Status Rank::RunPages(const Batch& batch) {
  for (const Batch::PageOp& op : batch.pages) {
    if (op.kind == Batch::PageOp::Kind::kCopy) {
      SHOAL_RETURN_IF_ERROR(kv_->CopyBlock(op.blocks[0], op.blocks[1]));
      continue;
    }
    if (pager_ == nullptr || op.record < 0 || op.record >= page_records_ || op.count < 1 ||
        op.count > kKvPageBlocks) {
      return absl::InternalError(absl::StrCat("a KV page of ", op.count, " blocks in record ",
                                              op.record, " of ", page_records_));
    }
    const auto blocks = absl::MakeConstSpan(op.blocks, op.count);
    const bool write = op.kind == Batch::PageOp::Kind::kWrite;
    SHOAL_RETURN_IF_ERROR(kv_->CheckBlocks(blocks, /*may_skip=*/!write));
    if (write) {
      pager_->Write(op.record, absl::MakeConstSpan(op.prefix, op.count), blocks);
    } else {
      pager_->Load(op.record, op.prefix[op.count - 1], blocks);
    }
  }
  for (const Batch::TableEntry& e : batch.table) {
    if (e.block > Batch::kOnDisk) continue;
    if (pager_ == nullptr || e.block <= Batch::kOnDisk - page_records_) {
      return absl::InternalError(absl::StrCat(
          "a block table names record ", Batch::kOnDisk - int64_t{e.block}, " of ", page_records_));
    }
  }
  Communicator& world = mesh_->world();
  switch (batch.kind) {
    case Batch::Kind::kStop:
      if (pager_ != nullptr) pager_->Flush();
      return absl::OkStatus();
    case Batch::Kind::kListPages: {
      if (world.rank() == 0) return absl::OkStatus();  // it knows its own
      const std::vector<Listed> list = ListPages(pager_->found());
      const auto count = static_cast<int64_t>(list.size());
      SHOAL_RETURN_IF_ERROR(world.Send(&count, sizeof count, 0, kPageTag));
      return world.Send(list.data(), count * static_cast<int64_t>(sizeof(Listed)), 0, kPageTag);
    }
    case Batch::Kind::kAwaitLoads: {
      std::vector<uint8_t> worked;
      for (const bool w : pager_->FinishLoads()) worked.push_back(w ? 1 : 0);
      if (world.rank() != 0)
        return world.Send(worked.data(), static_cast<int64_t>(worked.size()), 0, kPageTag);
      own_loads_ = std::move(worked);
      return absl::OkStatus();
    }
    case Batch::Kind::kAwaitStream: {
      if (pager_ == nullptr) return absl::InternalError("pages are streamed without a page file");
      std::vector<int> records = pager_->TakeFailedRecords();
      std::sort(records.begin(), records.end());
      records.erase(std::unique(records.begin(), records.end()), records.end());
      if (world.rank() == 0) {
        own_failures_ = std::move(records);
        return absl::OkStatus();
      }
      StreamFailures failures;
      failures.count = static_cast<int32_t>(std::min(records.size(), std::size(failures.records)));
      std::copy_n(records.begin(), failures.count, failures.records);
      return world.Send(&failures, sizeof failures, 0, kPageTag);
    }
    default:
      return absl::OkStatus();
  }
}

absl::StatusOr<std::vector<int>> Rank::CollectStreamFailures() {
  std::vector<int> records = std::exchange(own_failures_, {});
  for (int r = 1; r < mesh_->world().size(); ++r) {
    StreamFailures failures;
    SHOAL_RETURN_IF_ERROR(mesh_->world().Recv(&failures, sizeof failures, r, kPageTag));
    if (failures.count < 0 || failures.count > static_cast<int>(std::size(failures.records)))
      return absl::InternalError("a list of pages that could not be read is long");
    records.insert(records.end(), failures.records, failures.records + failures.count);
  }
  return records;
}

absl::StatusOr<std::vector<KeptPage>> Rank::CollectPages() {
  const std::vector<KvRecord>& found = pager_->found();
  std::vector<int> ranks_with(found.size(), 1);
  for (int r = 1; r < mesh_->world().size(); ++r) {
    int64_t count = 0;
    SHOAL_RETURN_IF_ERROR(mesh_->world().Recv(&count, sizeof count, r, kPageTag));
    if (count < 0 || count > page_records_)
      return absl::InternalError("a list of KV pages is long");
    std::vector<Listed> list(count);
    SHOAL_RETURN_IF_ERROR(mesh_->world().Recv(
        list.data(), count * static_cast<int64_t>(sizeof(Listed)), r, kPageTag));
    for (const Listed& l : list) {
      if (l.record < 0 || l.record >= static_cast<int64_t>(found.size())) continue;
      const KvRecord& mine = found[l.record];
      ranks_with[l.record] +=
          l.blocks == mine.blocks() && std::equal(mine.prefix.begin(), mine.prefix.end(), l.prefix);
    }
  }
  std::vector<int> records;
  for (size_t i = 0; i < found.size(); ++i) {
    if (found[i].blocks() > 0 && ranks_with[i] == mesh_->world().size())
      records.push_back(static_cast<int>(i));
  }
  std::sort(records.begin(), records.end(),
            [&found](int a, int b) { return found[a].stamp < found[b].stamp; });
  std::vector<KeptPage> pages;
  for (const int i : records) {
    KeptPage& page = pages.emplace_back();
    page.record = i;
    for (const KvName& n : found[i].prefix) page.prefix.push_back({n.low, n.high});
  }
  return pages;
}

absl::StatusOr<std::vector<bool>> Rank::CollectLoads(int count) {
  SHOAL_CHECK(static_cast<int>(own_loads_.size()) == count, "every rank has the same loads");
  std::vector<uint8_t> other(count);
  for (int r = 1; r < mesh_->world().size(); ++r) {
    SHOAL_RETURN_IF_ERROR(mesh_->world().Recv(other.data(), count, r, kPageTag));
    for (int i = 0; i < count; ++i) own_loads_[i] &= other[i];
  }
  return std::vector<bool>(own_loads_.begin(), own_loads_.end());
}

}  // namespace shoal
