// shoal inspect: what a checkpoint holds.
#include <cstdio>
#include <memory>
#include <string>

#include "absl/strings/str_replace.h"
#include "launcher/commands.h"
#include "launcher/demo_model.h"
#include "launcher/exit_code.h"
#include "shard/checkpoint.h"
#include "shard/inspect.h"

namespace shoal {
namespace {

int Inspect(const std::string& model, bool json) {
  absl::StatusOr<std::string> path = model.empty() ? DemoModelPath() : model;
  if (!path.ok()) return ReportError(path.status());
  absl::StatusOr<std::unique_ptr<Checkpoint>> checkpoint = OpenCheckpoint(*path);
  if (!checkpoint.ok()) return ReportError(checkpoint.status());
  std::string text = json ? InspectJson(**checkpoint) : InspectText(**checkpoint);
  if (model.empty()) absl::StrReplaceAll({{*path, "(the built-in demo model)"}}, &text);
  std::fputs(text.c_str(), stdout);
  return kExitOk;
}

}  // namespace

void AddInspectCommand(CLI::App& app, CommandLine& line) {
  struct Flags {
    std::string model, output = "text";
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* inspect = app.add_subcommand("inspect", "metadata, tensors and sizes of a model file");
  inspect->add_option("-m,--model", flags->model, "GGUF file; default: the built-in demo model")
      ->envname("SHOAL_MODEL");
  inspect->add_option("-o,--output", flags->output, "text or json")
      ->check(CLI::IsMember({"text", "json"}));
  inspect->callback(
      [flags, &line] { line.exit_code = Inspect(flags->model, flags->output == "json"); });
}

}  // namespace shoal
