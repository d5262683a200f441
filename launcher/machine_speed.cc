#include "launcher/machine_speed.h"

#include <sys/stat.h>
#include <sys/utsname.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/civil_time.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "kernels/status_macros.h"
#include "launcher/speed_probe.h"
#include "nlohmann/json.hpp"
#include "offload/cgroup.h"

namespace shoal {
namespace {

using Json = nlohmann::json;

constexpr int kDaysMax = 30;  // disks fill and wear, kernels and firmware are renewed
// Types with less than this share of the weights do not matter.
constexpr double kShareMin = 0.02;

// "node7, AMD EPYC 7B13": hosts may share a home folder, and a virtual machine may wake up on
// another CPU.
std::string ThisMachine() {
  utsname name = {};
  std::string host = uname(&name) == 0 ? name.nodename : "";
  std::ifstream cpus("/proc/cpuinfo");
  std::string line;
  while (std::getline(cpus, line)) {
    const size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) {
      return absl::StrCat(host, ", ", line.substr(colon + 2));
    }
  }
  return host;
}

absl::CivilDay Today() { return absl::ToCivilDay(absl::Now(), absl::LocalTimeZone()); }

// The measurements of earlier runs, by what was measured.
class SpeedCache {
 public:
  explicit SpeedCache(bool again) : again_(again) {
    const char* cache = std::getenv("XDG_CACHE_HOME");
    const char* home = std::getenv("HOME");
    if (cache != nullptr && *cache != '\0') {
      path_ = absl::StrCat(cache, "/shoal/machine.json");
    } else if (home != nullptr) {
      path_ = absl::StrCat(home, "/.cache/shoal/machine.json");
    }
    std::ifstream in(path_);
    entries_ = Json::parse(in, nullptr, false);
    if (!entries_.is_object()) entries_ = Json::object();
  }

  // The numbers called `names`, from the cache or from `measure`.
  absl::StatusOr<std::vector<double>> Get(
      const std::string& key, const std::vector<const char*>& names,
      const std::function<absl::StatusOr<std::vector<double>>()>& measure) {
    if (!again_) {
      std::vector<double> found = Find(key, names);
      if (!found.empty()) return found;
    }
    SHOAL_ASSIGN_OR_RETURN(std::vector<double> values, measure());
    Json entry = {{"date", absl::FormatCivilTime(Today())}};
    for (size_t i = 0; i < names.size(); ++i) entry[names[i]] = values[i];
    entries_[key] = std::move(entry);
    changed_ = true;
    return values;
  }

  void Save() const {
    if (path_.empty() || !changed_) return;
    std::error_code ignored;
    std::filesystem::create_directories(std::filesystem::path(path_).parent_path(), ignored);
    const std::string temporary = path_ + ".part";
    std::ofstream(temporary) << entries_.dump(1) << "\n";
    std::filesystem::rename(temporary, path_, ignored);
  }

  std::string oldest() const { return absl::FormatCivilTime(oldest_); }

 private:
  // Empty when the entry is not there, too old, or damaged.
  std::vector<double> Find(const std::string& key, const std::vector<const char*>& names) {
    const auto entry = entries_.find(key);
    if (entry == entries_.end() || !entry->is_object()) return {};
    const auto date = entry->find("date");
    absl::CivilDay day;
    if (date == entry->end() || !date->is_string() ||
        !absl::ParseCivilTime(date->get<std::string>(), &day) || day > Today() ||
        Today() - day > kDaysMax) {
      return {};
    }
    std::vector<double> values;
    for (const char* name : names) {
      const auto it = entry->find(name);
      if (it == entry->end() || !it->is_number()) return {};
      values.push_back(it->get<double>());
    }
    oldest_ = std::min(oldest_, day);
    return values;
  }

  const bool again_;
  std::string path_;
  Json entries_;
  bool changed_ = false;
  absl::CivilDay oldest_ = Today();
};

}  // namespace

absl::StatusOr<MeasuredSpeed> MeasureSpeed(const SpeedQuestion& q, bool again) {
  SpeedCache cache(again);
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Backend> backend, MakeCpuBackend(q.cpu));
  const std::string cpu = absl::StrCat(ThisMachine(), " ", backend->Describe());
  MeasuredSpeed measured;
  MachineSpeed& speed = measured.speed;

  // A model of several types takes the time of each.
  double total = 0, decode_s = 0, prefill_s = 0;
  for (const auto& [type, bytes] : q.bytes) total += static_cast<double>(bytes);
  DType main = q.bytes.begin()->first;
  double counted = 0;
  for (const auto& [type, bytes] : q.bytes) {
    if (bytes > q.bytes.at(main)) main = type;
    if (static_cast<double>(bytes) < kShareMin * total) continue;
    SHOAL_ASSIGN_OR_RETURN(
        const std::vector<double> rates,
        cache.Get(absl::StrCat(Info(type).name, " from memory ", cpu), {"decode", "prefill"},
                  [&, t = type]() -> absl::StatusOr<std::vector<double>> {
                    SHOAL_ASSIGN_OR_RETURN(const MultiplySpeed m,
                                           MeasureMultiplying(t, q.cpu, q.memory));
                    return std::vector<double>{m.decode, m.prefill};
                  }));
    counted += static_cast<double>(bytes);
    decode_s += static_cast<double>(bytes) / rates[0];
    prefill_s += static_cast<double>(bytes) / rates[1];
  }
  speed.decode_bytes_per_s = counted / decode_s;
  speed.prefill_bytes_per_s = counted / prefill_s;

  const AttentionShape& a = q.attention;
  SHOAL_ASSIGN_OR_RETURN(
      const std::vector<double> kv,
      cache.Get(absl::StrCat("attention ", a.q_heads, "/", a.group, " x ", a.head_dim, " type ",
                             static_cast<int>(q.kv_type), " ", cpu),
                {"decode", "prefill"}, [&]() -> absl::StatusOr<std::vector<double>> {
                  SHOAL_ASSIGN_OR_RETURN(const AttentionSpeed m,
                                         MeasureAttention(a, q.kv_type, q.cpu));
                  return std::vector<double>{m.decode, m.prefill};
                }));
  speed.kv_bytes_per_s = kv[0];
  speed.prefill_kv_bytes_per_s = kv[1];

  struct stat st = {};
  if (stat(q.path.c_str(), &st) == 0 && st.st_size >= kReadSampleBytes) {
    // A disk that a cgroup throttles is another one.
    const int64_t limit = DiskReadLimit(st.st_dev);
    const std::string limited = limit > 0 ? absl::StrCat(" at most ", limit) : "";
    SHOAL_ASSIGN_OR_RETURN(
        const std::vector<double> disk,
        cache.Get(
            absl::StrCat("disk in order ", st.st_dev, limited, " ", Info(main).name, " ", cpu),
            {"read", "read_slowdown", "decode_slowdown", "prefill_slowdown"},
            [&]() -> absl::StatusOr<std::vector<double>> {
              SHOAL_ASSIGN_OR_RETURN(const ReadSpeed r,
                                     MeasureReading(q.path, main, q.cpu, q.memory));
              return std::vector<double>{r.bytes_per_s, r.read_slowdown, r.decode_slowdown,
                                         r.prefill_slowdown};
            }));
    speed.read_bytes_per_s = disk[0];
    speed.read_slowdown = disk[1];
    speed.decode_slowdown = disk[2];
    speed.prefill_slowdown = disk[3];
  }
  cache.Save();
  measured.date = cache.oldest();
  return measured;
}

absl::StatusOr<MeasuredDevice> MeasureDevice(
    const std::string& name, bool again,
    const std::function<absl::StatusOr<DeviceSpeed>()>& measure) {
  SpeedCache cache(again);
  SHOAL_ASSIGN_OR_RETURN(
      const std::vector<double> rates,
      cache.Get(
          absl::StrCat("gpu ", name, ", ", ThisMachine()), {"read", "products", "link"},
          [&]() -> absl::StatusOr<std::vector<double>> {
            SHOAL_ASSIGN_OR_RETURN(const DeviceSpeed s, measure());
            return std::vector<double>{s.read_bytes_per_s, s.operations_per_s, s.link_bytes_per_s};
          }));
  cache.Save();
  return MeasuredDevice{{rates[0], rates[1], rates[2]}, cache.oldest()};
}

}  // namespace shoal
