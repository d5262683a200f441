#include "comm/one_shot.h"

#include <algorithm>
#include <cstdlib>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "comm/agree.h"
#include "comm/over_base.h"
#include "kernels/status_macros.h"

namespace shoal {
namespace {

// The kernels' side and what became of it. Owned by the queue's watch too, as what the queue has
// recorded points at its memory.
class OneShotState {
 public:
  OneShotState(std::unique_ptr<PeerSums> sums, const Communicator& host)
      : sums_(std::move(sums)), host_(&host) {}

  PeerSums& sums() { return *sums_; }

  // An error is final; kernels that wait end.
  absl::Status Fail(const absl::Status& status) {
    if (status_.ok()) status_ = status;
    sums_->Abort();
    return status_;
  }

  // What went wrong since, without waiting. Tells the kernels that the peers are alive.
  absl::Status Poll() {
    if (!status_.ok() || host_ == nullptr) return status_;
    if (const std::optional<int> rank = sums_->Missing(); rank.has_value()) {
      absl::Status known = host_->broken();  // it knows more
      if (known.ok()) {
        known = absl::UnavailableError(absl::StrCat("rank ", *rank, " on host ", host_->host(*rank),
                                                    " did not come to a sum"));
      }
      return Fail(known);
    }
    const absl::Time now = absl::Now();
    if (now - asked_ < absl::Milliseconds(1)) return absl::OkStatus();
    asked_ = now;
    if (absl::Status lost = host_->broken(); !lost.ok()) return Fail(lost);
    sums_->Vouch();
    return absl::OkStatus();
  }

  // The host communicator goes: whoever still waits waits in vain.
  void Leave() {
    host_ = nullptr;
    sums_->Abort();
  }

 private:
  const std::unique_ptr<PeerSums> sums_;
  const Communicator* host_;
  absl::Status status_;
  absl::Time asked_ = absl::InfinitePast();
};

class OneShotCommunicator final : public OverBase {
 public:
  OneShotCommunicator(std::unique_ptr<Communicator> base, std::shared_ptr<OneShotState> state,
                      int64_t most)
      : OverBase(std::move(base)), state_(std::move(state)), most_(most) {}
  ~OneShotCommunicator() override { state_->Leave(); }

  // The host's thread waits for none of them.
  absl::Status AllReduceSum(float* data, int64_t count, Wire wire) override {
    if (count > most_) return base().AllReduceSum(data, count, wire);
    SHOAL_RETURN_IF_ERROR(state_->Poll());
    if (count > 0) state_->sums().Enqueue(data, count);
    return absl::OkStatus();
  }
  int64_t recordable_sum() const override { return std::max(most_, base().recordable_sum()); }
  void Abort(const absl::Status& reason) override {
    state_->Fail(reason).IgnoreError();
    base().Abort(reason);
  }

 private:
  const std::shared_ptr<OneShotState> state_;
  const int64_t most_;
};

// Whether sums of several lengths, over slots used again and again, are right. Reads them back.
absl::Status Try(PeerSums& sums, Communicator& host, Backend& device, int64_t most) {
  SHOAL_ASSIGN_OR_RETURN(const DeviceMemory memory, device.Allocate(most * sizeof(float)));
  std::vector<float> values(most);
  bool right = true;
  for (const int64_t count :
       {most, int64_t{1}, most / 2 + 1, std::min<int64_t>(1000, most), most}) {
    // Every rank takes part to the end, whatever it has seen: the others wait for it.
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>((i + count) % 1009);
    const auto term = [&](int64_t i, int rank) { return values[i] * static_cast<float>(rank + 1); };
    std::vector<float> mine(count);
    for (int64_t i = 0; i < count; ++i) mine[i] = term(i, host.rank());
    const int64_t bytes = count * static_cast<int64_t>(sizeof(float));
    device.Copy(memory.data(), mine.data(), bytes);
    sums.Enqueue(memory.as<float>(), count);
    device.Copy(mine.data(), memory.data(), bytes);
    for (int64_t i = 0; i < count; ++i) {
      float sum = 0;
      for (int r = 0; r < host.size(); ++r) sum += term(i, r);
      right &= mine[i] == sum;
    }
  }
  if (sums.Missing().has_value()) {
    return absl::UnavailableError("a trial waited for a peer in vain");
  }
  return right ? absl::OkStatus() : absl::UnavailableError("a trial gave wrong sums");
}

int64_t MostNumbers(PeerMemory memory, int ranks, const OneShotOptions& options) {
  return std::min(OneShotBytes(memory, ranks), options.bytes) / static_cast<int64_t>(sizeof(float));
}

// This rank's part of sums through `memory`, tried; null where one of the ranks cannot, and why.
absl::StatusOr<std::unique_ptr<PeerSums>> SetUp(PeerMemory memory, Communicator& host,
                                                Backend& device, const OneShotOptions& options,
                                                std::string* why_not) {
  // Every step is taken by all ranks or by none.
  absl::StatusOr<std::unique_ptr<PeerSums>> sums =
      device.MakePeerSums(memory, host.rank(), host.size());
  SHOAL_ASSIGN_OR_RETURN(bool agreed, AllAgree(host, sums.status(), why_not));
  if (!agreed) return nullptr;
  const PeerSumsAddress mine = (*sums)->address();
  std::vector<PeerSumsAddress> all(host.size());
  SHOAL_RETURN_IF_ERROR(host.AllGather(&mine, sizeof mine, all.data()));
  SHOAL_ASSIGN_OR_RETURN(agreed, AllAgree(host, (*sums)->Connect(all), why_not));
  if (!agreed) return nullptr;
  (*sums)->SetPatience(absl::ToChronoNanoseconds(options.trial),
                       absl::ToChronoNanoseconds(options.trial));
  const int64_t most = MostNumbers(memory, host.size(), options);
  const absl::Status works = Try(**sums, host, device, most);
  SHOAL_RETURN_IF_ERROR(device.Check());
  SHOAL_ASSIGN_OR_RETURN(agreed, AllAgree(host, works, why_not));
  if (!agreed) return nullptr;
  (*sums)->SetPatience(absl::ToChronoNanoseconds(options.silence),
                       absl::ToChronoNanoseconds(options.stall));
  return *std::move(sums);
}

// Of one sum among some dozens, on the slowest rank.
absl::StatusOr<double> Microseconds(Communicator& host, Backend& device,
                                    absl::FunctionRef<absl::Status()> sum) {
  constexpr int kWarmUp = 3, kSums = 32;
  absl::Time begin;
  for (int i = 0; i < kWarmUp + kSums; ++i) {
    if (i == kWarmUp) {
      device.Wait();
      SHOAL_RETURN_IF_ERROR(host.Barrier());
      begin = absl::Now();
    }
    SHOAL_RETURN_IF_ERROR(sum());
  }
  device.Wait();
  const double mine = absl::ToDoubleMicroseconds(absl::Now() - begin) / kSums;
  std::vector<double> all(host.size());
  SHOAL_RETURN_IF_ERROR(host.AllGather(&mine, sizeof mine, all.data()));
  return *std::max_element(all.begin(), all.end());
}

// What the environment says of it, all ranks alike: 0 on one of them counts, then 1; else ' '.
absl::StatusOr<char> Wish(Communicator& host) {
  const char* const mine = std::getenv("SHOAL_PEER_SUMS");
  const char wish = mine == nullptr ? '\0' : mine[0];
  std::vector<char> all(host.size());
  SHOAL_RETURN_IF_ERROR(host.AllGather(&wish, 1, all.data()));
  for (const char c : {'0', '1'}) {
    if (std::count(all.begin(), all.end(), c) > 0) return c;
  }
  return ' ';
}

std::string WhyNotAmong(const Communicator& host) {
  if (host.size() < 2 || host.size() > PeerSums::kMostRanks) {
    return absl::StrCat("only among 2 to ", PeerSums::kMostRanks, " ranks");
  }
  for (int r = 1; r < host.size(); ++r) {
    if (host.host(r) != host.host(0)) return "only on one host";
  }
  return "";
}

}  // namespace

int64_t OneShotBytes(PeerMemory memory, int ranks) {
  const int64_t sent = memory == PeerMemory::kDevice ? 256 << 10 : 128 << 10;
  return sent / (ranks - 1) / 16 * 16;
}

absl::StatusOr<OneShotResult> MakeOneShotCommunicator(std::unique_ptr<Communicator> base,
                                                      Communicator& host, Backend& device,
                                                      OneShotOptions options) {
  OneShotResult result;
  result.communicator = std::move(base);
  result.why_not = WhyNotAmong(host);
  if (!result.why_not.empty()) return result;
  SHOAL_ASSIGN_OR_RETURN(const char wish, Wish(host));
  if (wish == '0') {
    result.why_not = "switched off (SHOAL_PEER_SUMS=0)";
    return result;
  }
  if (wish == '1') options.measure = false;

  std::unique_ptr<PeerSums> sums;
  PeerMemory memory = PeerMemory::kDevice;
  for (const PeerMemory m : {PeerMemory::kDevice, PeerMemory::kHost}) {
    if (sums != nullptr) break;
    memory = m;
    std::string why_not;
    SHOAL_ASSIGN_OR_RETURN(sums, SetUp(m, host, device, options, &why_not));
    if (sums == nullptr)
      absl::StrAppend(&result.why_not, result.why_not.empty() ? "" : "; ", why_not);
  }
  if (sums == nullptr) return result;
  std::string way = memory == PeerMemory::kDevice
                        ? "peer memory"
                        : absl::StrCat("host memory (", result.why_not, ")");
  result.why_not.clear();

  const int64_t most = MostNumbers(memory, host.size(), options);
  if (options.measure) {
    constexpr int64_t kToken = 4096;  // numbers of a model of middle size
    const int64_t count = std::min(most, kToken);
    SHOAL_ASSIGN_OR_RETURN(const DeviceMemory data, device.Allocate(count * sizeof(float)));
    SHOAL_ASSIGN_OR_RETURN(const double own, Microseconds(host, device, [&] {
                             sums->Enqueue(data.as<float>(), count);
                             return absl::OkStatus();
                           }));
    SHOAL_ASSIGN_OR_RETURN(const double other, Microseconds(host, device, [&] {
                             return result.communicator->AllReduceSum(data.as<float>(), count,
                                                                      Wire::kF32);
                           }));
    SHOAL_RETURN_IF_ERROR(device.Check());
    const std::string times = absl::StrFormat("%.1f us, otherwise %.1f us", own, other);
    if (own >= other) {
      result.why_not = absl::StrCat("slower through ", way, ": ", times);
      return result;
    }
    absl::StrAppend(&way, ", ", times);
  }
  auto state = std::make_shared<OneShotState>(std::move(sums), host);
  device.queue()->AddWatch([state] { return state->Poll(); });
  result.communicator =
      std::make_unique<OneShotCommunicator>(std::move(result.communicator), std::move(state), most);
  result.way = std::move(way);
  return result;
}

}  // namespace shoal
