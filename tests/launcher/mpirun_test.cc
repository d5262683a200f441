// mpirun's command line, and the division of its stderr into the ranks' lines and its own.
#include "launcher/mpirun.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_join.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

std::string Line(const MpirunJob& job, const MpirunHost& host, int ranks_per_host) {
  return absl::StrJoin(MpirunArguments(job, host, ranks_per_host), " ");
}

MpirunJob Job(int ranks, const std::string& hosts = "") {
  MpirunJob job;
  job.ranks = ranks;
  job.hosts = hosts;
  job.command = {"/usr/bin/shoal", "run", "-p", "two words"};
  return job;
}

TEST(MpirunArguments, OneMachineNeedsNoNetwork) {
  MpirunHost host;
  host.environment = {"SHOAL_WIRE"};
  const std::vector<std::string> argv = MpirunArguments(Job(2), host, 0);
  const std::string line = absl::StrJoin(argv, " ");
  EXPECT_THAT(line, testing::StartsWith("mpirun -np 2 "));
  EXPECT_THAT(line, HasSubstr("--oversubscribe --bind-to none"));
  EXPECT_THAT(line, HasSubstr("--mca btl self,vader"));
  EXPECT_THAT(line, HasSubstr("-x SHOAL_WIRE"));
  EXPECT_THAT(line, Not(HasSubstr("--allow-run-as-root")));
  EXPECT_THAT(line, Not(HasSubstr("btl_tcp_if_include")));
  EXPECT_THAT(line, HasSubstr("--mca plm isolated"));  // works where ssh is not installed
  EXPECT_EQ(argv.back(), "two words");                 // one argument
  EXPECT_THAT(line, HasSubstr("--mca btl_vader_eager_limit 32768"));
  host.program = "/opt/shoal/bin/mpirun";
  EXPECT_EQ(MpirunArguments(Job(2), host, 0).front(), "/opt/shoal/bin/mpirun");
}

TEST(MpirunArguments, RootAndContainersGetTheirFlags) {
  MpirunHost host;
  host.is_root = true;
  host.can_read_peers = false;
  EXPECT_THAT(Line(Job(2), host, 0), HasSubstr("--allow-run-as-root"));
  EXPECT_THAT(Line(Job(2), host, 0), HasSubstr("btl_vader_single_copy_mechanism none"));
}

TEST(MpirunArguments, SeveralHostsTalkOverTheChosenNetwork) {
  MpirunHost host;
  host.subnet = "192.0.2.0/24";
  const std::string line = Line(Job(4, "a,b"), host, 2);
  EXPECT_THAT(line, HasSubstr("--host a,b --map-by ppr:2:node"));
  EXPECT_THAT(line, HasSubstr("btl_tcp_if_include 192.0.2.0/24"));
  EXPECT_THAT(line, HasSubstr("oob_tcp_if_include 192.0.2.0/24"));
  EXPECT_THAT(line, HasSubstr("BatchMode=yes"));
  EXPECT_THAT(line, Not(HasSubstr("self,vader")));
  EXPECT_THAT(line, Not(HasSubstr("isolated")));
  host.subnet.clear();  // names of this machine, which Open MPI may not recognize
  EXPECT_THAT(Line(Job(2, "localhost"), host, 2), Not(HasSubstr("isolated")));
}

TEST(PlanHosts, SpreadsEvenlyUnlessTheUserGaveSlots) {
  EXPECT_TRUE(PlanHosts(Job(4))->hosts.empty());
  EXPECT_EQ(PlanHosts(Job(4, "a,b"))->ranks_per_host, 2);
  EXPECT_EQ(PlanHosts(Job(5, "a,b"))->ranks_per_host, 3);
  EXPECT_EQ(PlanHosts(Job(4, "a:3,b:1"))->ranks_per_host, 0);
  EXPECT_EQ(PlanHosts(Job(4, "a:3,b:1"))->hosts, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(PlanHosts(Job(4, "a:3,b:1"))->slots, (std::vector<int>{3, 1}));
  EXPECT_EQ(PlanHosts(Job(5, "a,b"))->slots, (std::vector<int>{3, 3}));
  EXPECT_EQ(PlanHosts(Job(2, " , ")).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(PlanHosts, ReadsHostFiles) {
  const std::string path = testing::TempDir() + "hosts." + std::to_string(getpid());
  MpirunJob job = Job(4);
  job.hostfile = path;
  EXPECT_EQ(PlanHosts(job).status().code(), absl::StatusCode::kNotFound);
  std::ofstream(path) << "# my machines\n\na\nb # slots=7\n";
  EXPECT_EQ(PlanHosts(job)->ranks_per_host, 2);
  std::ofstream(path) << "a slots=3\nb max_slots=4\n";
  EXPECT_EQ(PlanHosts(job)->ranks_per_host, 0);
  EXPECT_EQ(PlanHosts(job)->slots, (std::vector<int>{3, 1}));
  job.hosts = "a,b";
  EXPECT_THAT(std::string(PlanHosts(job).status().message()), HasSubstr("not both"));
  std::remove(path.c_str());
}

const std::string kRule(74, '-');

// What mpirun 4.1 writes when rank 1 is killed.
std::string KilledText() {
  return kRule +
         "\nPrimary job  terminated normally, but 1 process returned\na non-zero exit code. Per " +
         "user-direction, the job has been aborted.\n" + kRule + "\n" + kRule +
         "\nmpirun noticed that process rank 1 with PID 0 on node b exited on signal 9 "
         "(Killed).\n" +
         kRule + "\n";
}

std::string FailedText() {
  return kRule +
         "\nmpirun detected that one or more processes exited with non-zero status, thus causing\n"
         "the job to be terminated. The first process to do so was:\n\n"
         "  Process name: [[23044,1],0]\n  Exit code:    66\n" +
         kRule + "\n";
}

// The same for every division of the stream into reads.
std::string FeedAll(MpirunNoise& noise, const std::string& text, size_t step) {
  std::string out;
  for (size_t i = 0; i < text.size(); i += step) out += noise.Feed(text.substr(i, step));
  return out + noise.Finish();
}

TEST(MpirunNoise, RanksLinesPassUnchanged) {
  const std::string text =
      "loading  12 %\rloading  99 %\r\033[Kready\n[12:30:45] warm\n- a list\n--flag\n2 tokens\n\n"
      "shoal: model.gguf: cannot be read\nlast line without an end";
  for (size_t step : {size_t{1}, size_t{7}, text.size()}) {
    MpirunNoise noise;
    const std::string out = FeedAll(noise, text, step);
    EXPECT_EQ(out.substr(0, text.size()), text);
    EXPECT_FALSE(noise.loss().has_value());
    EXPECT_EQ(noise.Explanation(), "");
  }
}

TEST(MpirunNoise, PartialLinesDoNotWait) {
  MpirunNoise noise;
  EXPECT_EQ(noise.Feed("loading 12 %"), "loading 12 %");
  EXPECT_EQ(noise.Feed("\rloading 13 %"), "\rloading 13 %");
  EXPECT_EQ(noise.Feed("\n> "), "\n> ");
}

TEST(MpirunNoise, MpirunsNoticeOfASignalNamesRankAndHost) {
  const std::string text =
      "before\n" + KilledText() + "[b:123] 1 more process has sent help message\n";
  for (size_t step : {size_t{1}, size_t{10}, text.size()}) {
    MpirunNoise noise;
    EXPECT_EQ(FeedAll(noise, text, step), "before\n");
    EXPECT_EQ(noise.loss(), "rank 1 on host b was lost: killed by signal 9 (Killed)");
    EXPECT_EQ(noise.signal(), 9);
  }
}

TEST(MpirunNoise, ASurvivorsReportIsKeptAndWhatFollowsIsDropped) {
  MpirunNoise noise;
  EXPECT_EQ(
      FeedAll(noise,
              "shoal: rank 2 on host c was lost: no sign of life for 4s\nshoal: all is lost\n" +
                  FailedText(),
              11),
      "");
  EXPECT_EQ(noise.loss(), "rank 2 on host c was lost: no sign of life for 4s");
}

TEST(MpirunNoise, MpirunsSignalOutweighsASurvivorsReport) {
  // Rank 1 died, mpirun then killed rank 0, and another survivor saw only that.
  MpirunNoise noise;
  FeedAll(noise, "shoal: rank 0 on host a was lost: its connection closed\n" + KilledText(), 64);
  EXPECT_EQ(noise.loss(), "rank 1 on host b was lost: killed by signal 9 (Killed)");
}

TEST(MpirunNoise, ARanksOwnFailureIsSaidOnceWithItsCode) {
  MpirunNoise noise;
  const std::string said = "shoal: cannot read x.gguf\n";
  EXPECT_EQ(FeedAll(noise, said + said + FailedText(), 5), said);
  EXPECT_EQ(noise.exit_code(), 66);
  EXPECT_FALSE(noise.loss().has_value());
}

TEST(MpirunNoise, NoticesAreExplainedWhereKnownAndKeptWhereNot) {
  MpirunNoise known;
  EXPECT_EQ(
      FeedAll(known,
              kRule + "\nORTE was unable to reliably start one or more daemons.\n" + kRule + "\n",
              9),
      "");
  EXPECT_THAT(known.Explanation(), HasSubstr("ssh HOST true"));
  EXPECT_FALSE(known.exit_code().has_value());
  MpirunNoise unknown;
  FeedAll(unknown, kRule + "\nThe moon is in the wrong phase.\n" + kRule + "\n", 9);
  EXPECT_THAT(unknown.Explanation(), HasSubstr("wrong phase"));
}

TEST(MpirunNoise, TheRanksAnnouncementIsSeenAndNotShown) {
  MpirunNoise noise;
  EXPECT_FALSE(noise.started());
  testing::internal::CaptureStderr();
  AnnounceStart();
  EXPECT_EQ(FeedAll(noise, testing::internal::GetCapturedStderr(), 3), "");
  EXPECT_TRUE(noise.started());
}

TEST(MpirunNoise, ATableOfARankIsNoNoticeForEver) {
  MpirunNoise noise;
  std::string table = kRule + "\n";
  for (int i = 0; i < 200; ++i) table += "row\n";
  EXPECT_THAT(FeedAll(noise, table, 100), HasSubstr("row\nrow\n"));
}

TEST(RunMpirun, PassesOutputAndExitCodesAndLeavesNothing) {
  // Any program can stand in for mpirun here.
  EXPECT_EQ(*RunMpirun({"sh", "-c", "exit 0"}), 0);
  testing::internal::CaptureStderr();
  EXPECT_EQ(*RunMpirun({"sh", "-c", "echo why >&2; exit 5"}), 69);
  const std::string err = testing::internal::GetCapturedStderr();
  EXPECT_THAT(err, HasSubstr("why\nshoal: mpirun could not run the ranks (exit code 5)"));
  // A grandchild that outlives its parent and holds the pipes is ended too.
  EXPECT_EQ(*RunMpirun({"sh", "-c", "sleep 1000 & exit 0"}), 0);
}

TEST(RunMpirun, SaysHowToGetAMissingMpirun) {
  const absl::Status missing = RunMpirun({"/nowhere/mpirun"}).status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(missing.message()), HasSubstr("apt-get install openmpi-bin"));
}

TEST(RunMpirun, EndsAJobWhoseRanksNeverMeet) {
  testing::internal::CaptureStderr();
  EXPECT_EQ(*RunMpirun({"sh", "-c", "sleep 1000"}, absl::Milliseconds(100)), 69);
  EXPECT_THAT(testing::internal::GetCapturedStderr(), HasSubstr("--net"));
  // One that announced itself may last.
  EXPECT_EQ(*RunMpirun({"sh", "-c", "echo 'shoal: all ranks are up' >&2; sleep 1"},
                       absl::Milliseconds(500)),
            0);
}

TEST(RunMpirun, ALossEndsAJobThatDoesNotEndItself) {
  testing::internal::CaptureStderr();
  EXPECT_EQ(
      *RunMpirun(
          {"sh", "-c",
           "trap '' TERM; echo 'shoal: rank 1 on host b was lost: no sign of life for 4s' >&2; "
           "while true; do sleep 1; done"}),
      69);
  const std::string err = testing::internal::GetCapturedStderr();
  EXPECT_THAT(err, testing::StartsWith("shoal: rank 1 on host b was lost: no sign of life for 4s"));
  EXPECT_EQ(std::count(err.begin(), err.end(), '\n'), 1);
}

}  // namespace
}  // namespace shoal
