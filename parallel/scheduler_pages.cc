// The scheduler's side of KV pages on disk: what is written when, and what comes back.
#include <algorithm>
#include <utility>

#include "kernels/backend.h"
#include "kernels/check.h"
#include "parallel/scheduler.h"

namespace shoal {

// The pages on disk that follow the first `begin` blocks, as far as they go and are worth reading.
std::vector<Scheduler::DiskPart> Scheduler::FindOnDisk(const std::vector<PrefixHash>& hashes,
                                                       int begin) {
  std::vector<DiskPart> parts;
  const int count = limits_.pages > 0 ? static_cast<int>(hashes.size()) : 0;
  int at = begin;
  while (at < count) {
    // The whole page, or the longest part of it that was written when a sequence ended.
    int end = std::min(count, (at / kKvPageBlocks + 1) * kKvPageBlocks);
    std::optional<int> record;
    while (end > at && !(record = LookupPage(hashes[end - 1])).has_value()) --end;
    if (!record.has_value()) break;
    parts.push_back({*record, at, end});
    at = end;
    if (end % kKvPageBlocks != 0) break;
  }
  const double read_s = costs_.page_s * static_cast<double>(parts.size());
  const bool worth =
      read_s == 0 || costs_.token_s == 0 || read_s < costs_.token_s * kKvBlockTokens * (at - begin);
  if (worth) return parts;
  for (const DiskPart& part : parts) pages_.Release(part.record);
  return {};
}

// A prompt that memory cannot hold begins with the pages that are on disk, where that is more than
// the `found` blocks in memory.
bool Scheduler::TakeFromDisk(Sequence& s, const std::vector<PrefixHash>& hashes, int found,
                             Batch& batch) {
  std::vector<DiskPart> parts = FindOnDisk(hashes, 0);
  int whole = 0;
  for (const DiskPart& part : parts) whole += part.end % kKvPageBlocks == 0 ? 1 : 0;
  const bool worth = whole * kKvPageBlocks > found;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (!worth || static_cast<int>(i) >= whole) {
      pages_.Release(parts[i].record);
      continue;
    }
    s.hashes.insert(s.hashes.end(), hashes.begin() + parts[i].begin, hashes.begin() + parts[i].end);
    s.blocks.resize(parts[i].end, -1);
    KeepOnDisk(s, parts[i].record, batch);
  }
  if (!worth) return false;
  s.scheduled = s.computed = whole * kKvPageBlocks * kKvBlockTokens;
  totals_.disk_tokens += s.scheduled;
  return true;
}

// The page behind those that are on disk already is read from `record`, of which the sequence takes
// over a reference.
void Scheduler::KeepOnDisk(Sequence& s, int record, Batch& batch) {
  const auto page = static_cast<int32_t>(s.records.size());
  s.records.push_back(record);
  batch.table.push_back({s.slot, page * kKvPageBlocks, Batch::kOnDisk - record});
}

// Of the pages in memory that a sequence could leave to the disk.
int Scheduler::SpillableBlocks(const Sequence& s) const {
  const auto full = std::min(static_cast<int>(s.hashes.size()), s.scheduled / kKvBlockTokens);
  const auto pages = full / kKvPageBlocks - static_cast<int>(s.records.size());
  return std::max(0, pages) * kKvPageBlocks;
}

// Frees the blocks of the oldest page in memory of the sequence that streams, or of the only one
// that runs, which does from now on. False when there is none that the disk has or could have.
bool Scheduler::Spill(Batch& batch) {
  if (!limits_.stream || running_.empty() || !(streaming() || running_.size() == 1)) return false;
  Sequence& s = *running_.front();
  if (SpillableBlocks(s) == 0) return false;
  const auto begin = static_cast<int>(s.records.size()) * kKvPageBlocks;
  const int end = begin + kKvPageBlocks;
  std::optional<int> record = LookupPage(s.hashes[end - 1]);
  if (!record.has_value()) {  // another one took its place
    std::vector<PendingWrite> later = std::exchange(writes_, {});
    WriteLater(s, begin, end);
    WritePages(batch.pages);
    writes_ = std::move(later);
    record = LookupPage(s.hashes[end - 1]);
  }
  if (!record.has_value()) return false;
  if (s.records.empty()) s.computed = s.scheduled;
  for (int i = end - 1; i >= begin; --i) blocks_.Release(std::exchange(s.blocks[i], -1));
  KeepOnDisk(s, *record, batch);
  ++totals_.pages_streamed;
  return true;
}

// REQUIRES: blocks [0, part.begin) are there and blocks for the rest can be had.
void Scheduler::Load(Sequence& s, const DiskPart& part, const std::vector<PrefixHash>& hashes,
                     Batch& batch) {
  Batch::PageOp op;
  op.record = part.record;
  const int page_begin = part.begin / kKvPageBlocks * kKvPageBlocks;
  op.count = part.end - page_begin;
  for (int i = page_begin; i < part.end; ++i) {
    op.prefix[i - page_begin] = {hashes[i].low, hashes[i].high};
    op.blocks[i - page_begin] = -1;
    if (i < part.begin) continue;
    const int block = *blocks_.Allocate();
    op.blocks[i - page_begin] = block;
    batch.table.push_back({s.slot, i, block});
    s.blocks.push_back(block);
    s.hashes.push_back(hashes[i]);
  }
  batch.pages.push_back(op);
  ++s.loading;
  s.scheduled = part.end * kKvBlockTokens;
  totals_.disk_tokens += int64_t{part.end - part.begin} * kKvBlockTokens;
  loads_.push_back({&s, part});
}

void Scheduler::FinishLoads(const std::vector<bool>& worked) {
  SHOAL_CHECK(worked.size() == loads_.size(), "one answer for each load");
  for (size_t i = 0; i < worked.size(); ++i) {
    Sequence& s = *loads_[i].sequence;
    const DiskPart& part = loads_[i].part;
    --s.loading;
    if (!worked[i]) {
      pages_.Forget(part.record);
      IndexPage(part.record, {});
      ++totals_.pages_lost;
    }
    pages_.Release(part.record);
    const bool follows = static_cast<int>(s.blocks.size()) >= part.end;  // all before it worked
    if (!worked[i] || !follows) {
      if (follows) Truncate(s, part.begin);
      continue;
    }
    for (int b = part.begin; b < part.end; ++b) blocks_.Publish(s.blocks[b], s.hashes[b]);
  }
  loads_.clear();
  EndCancelled(cancelled_);
}

// Keeps the first blocks only: what follows is computed.
void Scheduler::Truncate(Sequence& s, int blocks) {
  while (static_cast<int>(s.blocks.size()) > blocks) {
    blocks_.Release(s.blocks.back());
    s.blocks.pop_back();
  }
  s.hashes.resize(blocks);
  const int lost = s.scheduled - blocks * kKvBlockTokens;
  s.scheduled -= lost;
  s.cached_tokens -= lost;
  totals_.cached_tokens -= lost;
  totals_.disk_tokens -= lost;
}

// Full blocks [begin, end) of a page go to disk with the next step, before their memory can be used
// for anything else.
void Scheduler::WriteLater(const Sequence& s, int begin, int end) {
  if (limits_.pages == 0 || begin >= end || record_of_.contains(s.hashes[end - 1])) return;
  writes_.push_back({{s.hashes.begin() + begin, s.hashes.begin() + end},
                     {s.blocks.begin() + begin, s.blocks.begin() + end}});
}

void Scheduler::WritePages(std::vector<Batch::PageOp>& ops) {
  for (PendingWrite& w : writes_) {
    if (record_of_.contains(w.prefix.back())) continue;
    const std::optional<int> record = pages_.Allocate();
    if (!record.has_value()) continue;  // all are being read: the page is computed again
    pages_.Publish(*record, w.prefix.back());
    Batch::PageOp op;
    op.kind = Batch::PageOp::Kind::kWrite;
    op.record = *record;
    op.count = static_cast<int>(w.blocks.size());
    for (int i = 0; i < op.count; ++i) {
      op.blocks[i] = w.blocks[i];
      op.prefix[i] = {w.prefix[i].low, w.prefix[i].high};
    }
    ops.push_back(op);
    IndexPage(*record, std::move(w.prefix));
    pages_.Release(*record);
    ++totals_.pages_written;
  }
  writes_.clear();
}

// A reference on the record that holds the block which ends this prefix.
std::optional<int> Scheduler::LookupPage(const PrefixHash& prefix) {
  const auto it = record_of_.find(prefix);
  if (it == record_of_.end()) return std::nullopt;
  return pages_.Lookup(prefixes_[it->second].back());
}

// The record now holds these blocks. Of two that hold the same block the later is used.
void Scheduler::IndexPage(int record, std::vector<PrefixHash> prefix) {
  for (const PrefixHash& old : prefixes_[record]) {
    if (const auto it = record_of_.find(old); it != record_of_.end() && it->second == record)
      record_of_.erase(it);
  }
  for (const PrefixHash& now : prefix) record_of_[now] = record;
  prefixes_[record] = std::move(prefix);
}

void Scheduler::RestorePages(absl::Span<const KeptPage> pages) {
  std::vector<std::pair<int, PrefixHash>> held;
  std::unordered_map<PrefixHash, int, PrefixHasher> last;
  for (const KeptPage& page : pages) last[page.prefix.back()] = page.record;
  for (const KeptPage& page : pages) {
    if (last.at(page.prefix.back()) != page.record) continue;  // the same page twice
    held.push_back({page.record, page.prefix.back()});
    IndexPage(page.record, page.prefix);
  }
  pages_.Restore(held);
}

std::vector<Batch::PageOp> Scheduler::TakeWrites() {
  std::vector<Batch::PageOp> ops;
  WritePages(ops);
  return ops;
}

}  // namespace shoal
