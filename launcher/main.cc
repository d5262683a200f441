// The shoal binary: one program, a command for each thing people do with it.
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "CLI/CLI.hpp"
#include "launcher/commands.h"
#include "launcher/exit_code.h"
#include "launcher/usage_message.h"

namespace {

// A file that is opened while one of these is closed would take its number, and be written to as
// if it were the terminal.
void OpenStandardFiles() {
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (fcntl(fd, F_GETFD) < 0) open("/dev/null", O_RDWR);
  }
}

// A result that could not be written (the disk is full) is no success.
int FlushedExitCode(int code) {
  const bool written = std::fflush(stdout) == 0 && std::ferror(stdout) == 0;
  if (written || code != shoal::kExitOk) return code;
  std::fputs("shoal: cannot write the result to stdout\n", stderr);
  return shoal::kExitInternal;
}

// Fingers type llama.cpp's -ngl, which to CLI11 is -n with the value "gl".
void RenameLlamaFlags(int argc, char** argv) {
  static char gpu_layers[] = "--n-gpu-layers";
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "-ngl") == 0) argv[i] = gpu_layers;
  }
}

}  // namespace

int main(int argc, char** argv) {
  OpenStandardFiles();
  shoal::ExitWhenOutOfMemory();
  RenameLlamaFlags(argc, argv);
  CLI::App app{"shoal runs one large language model across many small machines", "shoal"};
  app.require_subcommand(1);
  app.set_version_flag("--version", SHOAL_VERSION);
  app.set_help_all_flag("--help-all", "help of every command");
  shoal::CommandLine line{argc, argv, shoal::kExitOk};
  shoal::AddRunCommand(app, line);
  shoal::AddBenchCommand(app, line);
  shoal::AddPerplexityCommand(app, line);
  shoal::AddInspectCommand(app, line);
  shoal::AddPlanCommand(app, line);
  shoal::AddShardCommand(app, line);
  shoal::AddServeCommand(app, line);
  shoal::AddDoctorCommand(app, line);
  shoal::AddEngineCommand(app, line);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help, --version
    std::fputs(shoal::UsageMessage(app, e, argc, argv).c_str(), stderr);
    return shoal::kExitUsage;
  }
  return FlushedExitCode(line.exit_code);
}
