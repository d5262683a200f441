#include "launcher/doctor.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "launcher/captured_run.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr int64_t kGiB = int64_t{1} << 30;

MachineFacts Healthy() {
  MachineFacts m;
  m.host = "vm";
  m.version = "1.0";
  m.build = "aa";
  m.cpu.levels = "scalar, avx2";
  m.memory = {16 * kGiB, 12 * kGiB, "MemAvailable", -1, 0, 2 << 20, "madvise"};
  m.mpi = {"mpirun", "4.1.4", "4.1.4"};
  m.cuda.why_none = "this shoal was built without CUDA";
  m.cuda.why_no_nccl = "libnccl.so.2 was not found";
  return m;
}

MachineFacts WithGpus(int count) {
  MachineFacts m = Healthy();
  m.cuda.built = true;
  m.cuda.gpus_on_bus = count;
  m.cuda.why_none.clear();
  for (int i = 0; i < count; ++i) {
    GpuFacts& g = m.cuda.gpus.emplace_back();
    g.index = i;
    g.total_bytes = 24 * kGiB;
    g.free_bytes = 23 * kGiB;
    g.from_host_gbps = g.to_host_gbps = 25;
    for (int j = 0; j < count; ++j) {
      if (j != i) g.peers.push_back(j);
    }
  }
  m.cuda.nccl = "2.28.9";
  m.cuda.why_no_nccl.clear();
  return m;
}

HostReport Host(const std::string& name, const MachineFacts& facts) {
  return {name, facts, "", ""};
}

// The only finding, with or without "wrong".
void ExpectOne(const std::vector<Finding>& findings, bool wrong, const std::string& what) {
  ASSERT_EQ(findings.size(), 1u) << what;
  EXPECT_EQ(findings[0].wrong, wrong) << findings[0].what;
  EXPECT_THAT(findings[0].what, HasSubstr(what));
  EXPECT_FALSE(findings[0].advice.empty()) << what;
}

TEST(DiagnoseMachine, NothingIsWrongWithAHealthyOne) {
  EXPECT_THAT(DiagnoseMachine(Healthy(), true), IsEmpty());
  EXPECT_THAT(DiagnoseMachine(WithGpus(2), true), IsEmpty());
}

TEST(DiagnoseMachine, CpuAndMemory) {
  MachineFacts m = Healthy();
  m.cpu.levels = "scalar";
  ExpectOne(DiagnoseMachine(m, false), true, "AVX2");
  m = Healthy();
  m.memory.free_bytes = kGiB / 2;
  ExpectOne(DiagnoseMachine(m, false), true, "only 512 MiB");
  m.memory.bound = "/sys/fs/cgroup/box";
  ExpectOne(DiagnoseMachine(m, false), false, "control group /sys/fs/cgroup/box leaves 512 MiB");
  m = Healthy();
  m.memory.memlock_bytes = 64 << 10;
  ExpectOne(DiagnoseMachine(m, false), false, "lock 64.0 KiB");
  m.why_no_io_uring = "not permitted";  // says it all: registered buffers are io_uring's
  ExpectOne(DiagnoseMachine(m, false), false, "io_uring cannot be used: not permitted");
  m = Healthy();
  m.memory.transparent_huge_pages = "never";
  ExpectOne(DiagnoseMachine(m, false), false, "huge pages");
}

TEST(DiagnoseMachine, Gpus) {
  MachineFacts m = Healthy();
  m.cuda.gpus_on_bus = 1;
  ExpectOne(DiagnoseMachine(m, false), true, "built without CUDA");
  m.cuda.built = true;
  m.cuda.why_none = "no NVIDIA driver is installed";
  ExpectOne(DiagnoseMachine(m, false), true, "no GPU can be used: no NVIDIA driver");
  m.cuda.gpus_on_bus = 0;
  ExpectOne(DiagnoseMachine(m, false), false, "no GPU: no NVIDIA driver");

  m = WithGpus(2);
  m.cuda.nccl.clear();
  m.cuda.why_no_nccl = "not found";
  ExpectOne(DiagnoseMachine(m, false), true, "NCCL cannot be used: not found");
  m.cuda.gpus.resize(1);
  EXPECT_THAT(DiagnoseMachine(m, false), IsEmpty());  // one GPU alone needs none
  ExpectOne(DiagnoseMachine(m, true), true, "NCCL");

  m = WithGpus(2);
  m.cuda.gpus[1].peers.clear();
  ExpectOne(DiagnoseMachine(m, false), false, "GPU 1 cannot reach");
  m = WithGpus(1);
  m.cuda.gpus[0].to_host_gbps = 1.6;
  ExpectOne(DiagnoseMachine(m, false), false, "moves only 1.6 GB/s");
  m.cuda.gpus[0].to_host_gbps = 25;
  m.cuda.gpus[0].free_bytes = kGiB;
  ExpectOne(DiagnoseMachine(m, false), false, "has 1.00 GiB free of 24.0 GiB");
}

TEST(DiagnoseMachine, MpiDiskAndModel) {
  MachineFacts m = Healthy();
  m.mpi.mpirun_version.clear();
  ExpectOne(DiagnoseMachine(m, false), true, "mpirun does not run");
  m.mpi.mpirun_version = "5.0.1";
  ExpectOne(DiagnoseMachine(m, false), true, "is of Open MPI 5.0.1");
  m = Healthy();
  m.disk = {"/data", 0, 0, 0, "", "No such file or directory"};
  ExpectOne(DiagnoseMachine(m, false), true, "/data could not be measured: No such");
  m.disk = {"/data", 0.2, 0.15, kGiB, "io_uring, direct", ""};
  ExpectOne(DiagnoseMachine(m, false), false, "reads 0.15 GB/s");
  m = Healthy();
  m.model = {"m.gguf", "", "m.gguf was not found"};
  ExpectOne(DiagnoseMachine(m, false), true, "m.gguf was not found");
}

TEST(DiagnoseCluster, WhatDiffersIsNamed) {
  const MachineFacts a = Healthy();
  EXPECT_THAT(DiagnoseCluster({Host("pc1", a), Host("pc2", a)}), IsEmpty());
  MachineFacts b = a;
  b.version = "0.9";
  b.build = "bb";  // follows from the version: said once
  ExpectOne(DiagnoseCluster({Host("pc1", a), Host("pc2", b)}), true,
            "pc2 has shoal 0.9, pc1 has 1.0");
  b.version = a.version;
  ExpectOne(DiagnoseCluster({Host("pc1", a), Host("pc2", b)}), true, "pc2 has another build");
  b = a;
  b.mpi.library_version = b.mpi.mpirun_version = "4.0.3";
  ExpectOne(DiagnoseCluster({Host("pc1", a), Host("pc2", b)}), true, "Open MPI 4.0.3");
  MachineFacts c = a, d = a;
  c.model = {"m", "1111", ""};
  d.model = {"m", "2222", ""};
  ExpectOne(DiagnoseCluster({Host("pc1", c), Host("pc2", d)}), true, "pc2 has another model: 2222");
  ExpectOne(DiagnoseCluster({Host("pc1", a), {"pc3", {}, "ssh does not reach it", "ssh-copy-id"}}),
            true, "pc3: ssh does not reach it");
}

TEST(DiagnoseLinks, SlowOnesAreRemarks) {
  EXPECT_THAT(DiagnoseLinks({{0, 1, "a", "b", 40, 0.118}}), IsEmpty());
  ExpectOne(DiagnoseLinks({{0, 1, "a", "b", 40, 0.011}}), false, "a and b are far apart");
  ExpectOne(DiagnoseLinks({{0, 1, "a", "b", 3000, 0.118}}), false, "3000 us");
}

TEST(MachineFacts, JsonGivesThemBack) {
  MachineFacts m = WithGpus(2);
  m.disk = {"/data", 1.5, 2.5, kGiB, "io_uring, direct", ""};
  const std::string json = FactsToJson(m);
  const absl::StatusOr<MachineFacts> back = FactsFromJson(json);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(FactsToJson(*back), json);
  EXPECT_EQ(back->cuda.gpus[1].peers, (std::vector<int>{0}));
  for (const char* bad : {"", "hello", "[]", "{\"host\": 3}", "{\"cuda\": {\"gpus\": 1}}"}) {
    EXPECT_EQ(FactsFromJson(bad).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

TEST(RunCaptured, KeepsWhatIsSaidAndEndsWhatLasts) {
  const auto run = RunCaptured({"sh", "-c", "echo out; echo err >&2; exit 3"}, absl::Seconds(60));
  ASSERT_TRUE(run.ok()) << run.status();
  EXPECT_EQ(run->exit_code, 3);
  EXPECT_EQ(run->out, "out\n");
  EXPECT_EQ(run->err, "err\n");
  EXPECT_EQ(RunCaptured({"sh", "-c", "kill -9 $$"}, absl::Seconds(60))->exit_code, 128 + 9);
  EXPECT_EQ(RunCaptured({"/no/such/program"}, absl::Seconds(60)).status().code(),
            absl::StatusCode::kNotFound);
  EXPECT_EQ(RunCaptured({"sleep", "1000"}, absl::Milliseconds(50)).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(RunCaptured({"yes"}, absl::Seconds(60)).status().code(),
            absl::StatusCode::kDeadlineExceeded);  // says too much
}

}  // namespace
}  // namespace shoal
