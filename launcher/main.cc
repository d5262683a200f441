// The shoal binary: one program, a command for each thing people do with it.
#include <cstdio>

#include "CLI/CLI.hpp"
#include "launcher/commands.h"
#include "launcher/exit_code.h"

int main(int argc, char** argv) {
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
  shoal::AddEngineCommand(app, line);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help, --version
    if (argc > 1 && argv[1][0] != '-' && app.get_subcommands().empty()) {
      std::fprintf(stderr, "shoal: '%s' is not a command.\nTry 'shoal --help'.\n", argv[1]);
      return shoal::kExitUsage;
    }
    std::fprintf(stderr, "shoal: %s\nTry 'shoal --help' or 'shoal run --help'.\n", e.what());
    return shoal::kExitUsage;
  }
  return line.exit_code;
}
