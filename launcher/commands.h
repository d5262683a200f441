// The commands of the shoal binary. Each Add function registers one with CLI11; when it is chosen
// it runs and leaves its exit code.
#pragma once

#include "CLI/CLI.hpp"

namespace shoal {

struct CommandLine {
  int argc = 0;
  char** argv = nullptr;
  int exit_code = 0;
};

void AddRunCommand(CLI::App& app, CommandLine& line);
void AddBenchCommand(CLI::App& app, CommandLine& line);
void AddPerplexityCommand(CLI::App& app, CommandLine& line);
void AddPlanCommand(CLI::App& app, CommandLine& line);
void AddShardCommand(CLI::App& app, CommandLine& line);
void AddInspectCommand(CLI::App& app, CommandLine& line);
void AddServeCommand(CLI::App& app, CommandLine& line);
void AddDoctorCommand(CLI::App& app, CommandLine& line);
void AddEngineCommand(CLI::App& app, CommandLine& line);

}  // namespace shoal
