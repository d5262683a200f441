#include "launcher/machine_speed.h"

#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "kernels/buffer.h"
#include "kernels/packed_matrix.h"
#include "kernels/status_macros.h"
#include "nlohmann/json.hpp"
#include "offload/async_file.h"

namespace shoal {
namespace {

using Json = nlohmann::json;

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string CachePath() {
  const char* cache = std::getenv("XDG_CACHE_HOME");
  if (cache != nullptr && *cache != '\0') return absl::StrCat(cache, "/shoal/machine.json");
  const char* home = std::getenv("HOME");
  return home == nullptr ? "" : absl::StrCat(home, "/.cache/shoal/machine.json");
}

Json LoadCache() {
  std::ifstream in(CachePath());
  Json json = Json::parse(in, nullptr, false);
  return json.is_object() ? json : Json::object();
}

void SaveCache(const Json& json) {
  const std::filesystem::path path = CachePath();
  if (path.empty()) return;
  std::error_code ignored;
  std::filesystem::create_directories(path.parent_path(), ignored);
  const std::string temporary = path.string() + ".part";
  std::ofstream(temporary) << json.dump(1) << "\n";
  std::filesystem::rename(temporary, path, ignored);
}

// Reads 1 MiB pieces as the streamer does, from all over the file, for about a second; the first
// quarter finds the depth and does not count.
absl::StatusOr<double> MeasureReading(const std::string& path) {
  constexpr double kSeconds = 1.2;
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<AsyncFile> file, AsyncFile::Open(path, {}));
  const int64_t pieces = file->size() / kIoPieceBytes;
  if (pieces < 8) return 0.0;  // too small a file to say anything about
  constexpr int kSlots = 8;
  SHOAL_ASSIGN_OR_RETURN(Buffer buffer, Buffer::Allocate(kSlots * kIoPieceBytes));
  file->Register(buffer.data(), static_cast<int64_t>(buffer.size()));
  std::vector<IoDone> done;
  std::vector<int> free;
  for (int i = 0; i < kSlots; ++i) free.push_back(i);
  const double start = Now();
  double counted_from = 0;
  int64_t next = 0, bytes = 0;
  while (true) {
    const double now = Now();
    if (now - start > kSeconds / 4 && counted_from == 0) {
      counted_from = now;
      bytes = 0;
    }
    const bool stop = now - start > kSeconds;
    // A stretch of 64 pieces here, then one elsewhere: caches of the disk hold no whole model.
    while (!stop && !free.empty()) {
      const int64_t piece = (next / 64 * 977 + next % 64) % pieces;
      ++next;
      file->Submit({false, piece * kIoPieceBytes, buffer.data() + free.back() * kIoPieceBytes,
                    kIoPieceBytes, static_cast<uint64_t>(free.back())});
      free.pop_back();
    }
    if (file->in_flight() == 0) break;
    done.clear();
    file->Wait(&done);
    for (const IoDone& d : done) {
      SHOAL_RETURN_IF_ERROR(d.status);
      bytes += d.bytes;
      free.push_back(static_cast<int>(d.tag));
    }
  }
  return static_cast<double>(bytes) / (Now() - counted_from);
}

struct Multiplying {
  double decode = 0, prefill = 0;
};

absl::StatusOr<Multiplying> MeasureMultiplying(DType type, const CpuOptions& cpu) {
  constexpr int kCols = 4096, kPrefillRows = 64;
  constexpr int64_t kBytes = 192 << 20;  // more than caches hold
  const int64_t rows = kBytes / RowBytes(type, kCols) / kPanelRows * kPanelRows;
  const PackedShape shape = MakePackedShape(type, rows, 0, kCols);
  SHOAL_ASSIGN_OR_RETURN(Buffer weights, Buffer::Allocate(shape.bytes()));
  std::memset(weights.data(), 0x11, weights.size());  // scales that are small normal numbers
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Backend> backend, MakeCpuBackend(cpu));
  Backend::Limits limits;
  limits.rows = kPrefillRows;
  limits.cols = kCols;
  limits.out_rows = static_cast<int>(rows);
  limits.heads = limits.head_dim = limits.context = kKvBlockTokens;  // no attention here
  SHOAL_RETURN_IF_ERROR(backend->Reserve(limits));
  const std::vector<float> x(kPrefillRows * kCols, 0.5f);
  std::vector<float> y(kPrefillRows * rows);
  const PackedMatrix matrix{shape, weights.data()};
  const auto best_of = [&](int times, RowCount count) {
    double best = 1e9;
    for (int i = 0; i < times; ++i) {
      const double start = Now();
      backend->Linear(LinearInput::Plain(x.data(), kCols), kCols, count,
                      {{&matrix, nullptr, y.data(), rows, false}});
      best = std::min(best, Now() - start);
    }
    return best;
  };
  Multiplying m;
  m.decode = static_cast<double>(shape.bytes()) / best_of(8, {1, 0});
  m.prefill = static_cast<double>(shape.bytes()) * kPrefillRows / best_of(2, {0, kPrefillRows});
  return m;
}

}  // namespace

absl::StatusOr<MeasuredSpeed> MeasureSpeed(const std::string& path, DType type,
                                           const CpuOptions& cpu, bool again) {
  Json cache = LoadCache();
  bool changed = false;
  const std::string today = absl::FormatTime("%Y-%m-%d", absl::Now(), absl::LocalTimeZone());
  const auto entry =
      [&](const std::string& key,
          const std::function<absl::StatusOr<Json>()>& measure) -> absl::StatusOr<Json> {
    if (!again && cache.contains(key) && cache[key].is_object() && cache[key].contains("date")) {
      return cache[key];
    }
    SHOAL_ASSIGN_OR_RETURN(Json json, measure());
    json["date"] = today;
    cache[key] = json;
    changed = true;
    return json;
  };
  struct stat st = {};
  stat(path.c_str(), &st);
  SHOAL_ASSIGN_OR_RETURN(const Json disk,
                         entry(absl::StrCat("disk ", st.st_dev), [&]() -> absl::StatusOr<Json> {
                           SHOAL_ASSIGN_OR_RETURN(const double rate, MeasureReading(path));
                           return Json{{"read", rate}};
                         }));
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Backend> backend, MakeCpuBackend(cpu));
  SHOAL_ASSIGN_OR_RETURN(
      const Json kernels,
      entry(absl::StrCat(Info(type).name, " ", backend->Describe()), [&]() -> absl::StatusOr<Json> {
        SHOAL_ASSIGN_OR_RETURN(const Multiplying m, MeasureMultiplying(type, cpu));
        return Json{{"decode", m.decode}, {"prefill", m.prefill}};
      }));
  if (changed) SaveCache(cache);
  const auto number = [](const Json& json, const char* key) {
    const auto it = json.find(key);
    return it != json.end() && it->is_number() ? it->get<double>() : 0.0;
  };
  MeasuredSpeed speed;
  speed.read_bytes_per_s = number(disk, "read");
  speed.decode_bytes_per_s = number(kernels, "decode");
  speed.prefill_bytes_per_s = number(kernels, "prefill");
  const auto date = [&](const Json& json) {
    const auto it = json.find("date");
    return it != json.end() && it->is_string() ? it->get<std::string>() : today;
  };
  speed.date = std::min(date(disk), date(kernels));
  return speed;
}

}  // namespace shoal
