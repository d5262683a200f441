// KV pages to disk and back, in GB/s, beside plain reads and writes of the same size.
//
// kv_pager_speed DIR [PAGES] [LAYERS] [BLOCK_BYTES]: writes a page file of that shape (llama-8b in
// f16 by default: parts of 1 MiB) to DIR and leaves it there, so that fio can read it too. "first
// touch" loads into memory that was never written.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/buffer.h"
#include "kernels/check.h"
#include "offload/async_file.h"
#include "offload/kv_pager.h"

namespace shoal {
namespace {

constexpr int kRounds = 3;  // the best counts: what else the disk does comes and goes

// Blocks [block][layer][block_bytes], as in parallel/kv_cache.h.
class Pool final : public KvMemory {
 public:
  Pool(const KvPageShape& shape, int blocks) : shape_(shape) {
    auto memory = Buffer::Allocate(int64_t{blocks} * shape.layers * shape.block_bytes);
    SHOAL_CHECK(memory.ok(), "no memory for the blocks");
    memory_ = *std::move(memory);
  }
  void Touch() { std::memset(memory_.data(), 1, memory_.size()); }
  void CopyOut(int layer, absl::Span<const int32_t> blocks, uint8_t* to) override {
    for (size_t i = 0; i < blocks.size(); ++i)
      std::memcpy(to + i * shape_.block_bytes, At(blocks[i], layer), shape_.block_bytes);
  }
  absl::Status CopyIn(int layer, absl::Span<const int32_t> blocks, const uint8_t* from) override {
    for (size_t i = 0; i < blocks.size(); ++i)
      std::memcpy(At(blocks[i], layer), from + i * shape_.block_bytes, shape_.block_bytes);
    return absl::OkStatus();
  }

 private:
  uint8_t* At(int block, int layer) {
    return memory_.data() + (int64_t{block} * shape_.layers + layer) * shape_.block_bytes;
  }
  const KvPageShape shape_;
  Buffer memory_;
};

double SecondsOf(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::vector<int32_t> BlocksOf(int page) {
  std::vector<int32_t> blocks(kKvPageBlocks);
  std::iota(blocks.begin(), blocks.end(), page * kKvPageBlocks);
  return blocks;
}

KvName NameOf(int page, int block) { return {static_cast<uint64_t>(page), uint64_t(block)}; }

int Main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: kv_pager_speed DIR [PAGES] [LAYERS] [BLOCK_BYTES]\n");
    return 2;
  }
  const int pages = argc > 2 ? std::atoi(argv[2]) : 16;
  KvPager::Options o;
  o.file.dir = argv[1];
  o.file.keep = true;
  o.file.key = {1, static_cast<uint64_t>(getpid())};
  o.file.shape = {argc > 3 ? std::atoi(argv[3]) : 32, argc > 4 ? std::atoi(argv[4]) : 65536};
  o.file.records = pages;
  o.warn = [](const std::string& w) { std::fprintf(stderr, "%s\n", w.c_str()); };
  const KvPageShape& shape = o.file.shape;
  const double bytes = static_cast<double>(pages) * shape.layers * shape.part_bytes();
  const auto say = [bytes](const char* what, double s) {
    std::printf("%-28s %.2f GB/s\n", what, bytes / s / 1e9);
    std::fflush(stdout);
  };
  std::string path;
  {
    Pool pool(shape, pages * kKvPageBlocks);
    pool.Touch();
    auto pager = KvPager::Open(o, pool);
    SHOAL_CHECK(pager.ok(), "the page file does not open");
    const auto write = [&] {
      for (int p = 0; p < pages; ++p) {
        std::vector<KvName> names;
        for (int b = 0; b < kKvPageBlocks; ++b) names.push_back(NameOf(p, b));
        (*pager)->Write(p, names, BlocksOf(p));
      }
      (*pager)->Flush();
    };
    say("write, new file", SecondsOf(write));
    double best = 1e9;
    for (int i = 0; i < kRounds; ++i) best = std::min(best, SecondsOf(write));
    say("write again", best);
    best = 1e9;
    std::vector<KvPager::StreamPart> parts;
    for (int l = 0; l < shape.layers; ++l)
      for (int p = 0; p < pages; ++p) parts.push_back({p, l});
    std::vector<uint8_t> window(shape.part_bytes());
    for (int i = 0; i < kRounds; ++i) {
      best = std::min(best, SecondsOf([&] {
                        (*pager)->BeginStream(parts);
                        for (size_t part = 0; part < parts.size(); ++part)
                          std::memcpy(window.data(), (*pager)->NextPart(), window.size());
                        (*pager)->EndStream();
                      }));
    }
    say("stream, layer by layer", best);
  }
  for (const auto& e : std::filesystem::directory_iterator(o.file.dir)) {
    if (e.path().extension() == ".pages") path = e.path();
  }
  Pool pool(shape, pages * kKvPageBlocks);
  auto pager = KvPager::Open(o, pool);
  SHOAL_CHECK(pager.ok(), "the page file does not open");
  const auto load = [&] {
    for (int p = 0; p < pages; ++p) (*pager)->Load(p, NameOf(p, kKvPageBlocks - 1), BlocksOf(p));
    for (const bool worked : (*pager)->FinishLoads()) SHOAL_CHECK(worked, "a page did not load");
  };
  say("load, first touch", SecondsOf(load));
  double best = 1e9;
  for (int i = 0; i < kRounds; ++i) best = std::min(best, SecondsOf(load));
  say("load", best);
  // The same bytes as plain pieces.
  AsyncFile::Options plain;
  plain.write = true;
  auto file = AsyncFile::Open(path, plain);
  auto buffer = Buffer::Allocate(64 << 20);
  SHOAL_CHECK(file.ok() && buffer.ok(), "the page file does not open again");
  std::memset(buffer->data(), 1, buffer->size());
  (*file)->Register(buffer->data(), static_cast<int64_t>(buffer->size()));
  for (const bool write : {false, true}) {
    best = 1e9;
    const auto size = static_cast<int64_t>(buffer->size());
    for (int i = 0; i < kRounds; ++i) {
      best = std::min(best, SecondsOf([&] {
                        for (int64_t at = 0; at < static_cast<int64_t>(bytes); at += size) {
                          const int64_t n =
                              std::min<int64_t>(size, static_cast<int64_t>(bytes) - at);
                          const auto s = (*file)->Transfer(write, at, buffer->data(), n);
                          SHOAL_CHECK(s.ok(), "a plain transfer failed");
                        }
                      }));
    }
    say(write ? "plain writes" : "plain reads", best);
  }
  std::printf("%s\n", path.c_str());
  return 0;
}

}  // namespace
}  // namespace shoal

int main(int argc, char** argv) { return shoal::Main(argc, argv); }
