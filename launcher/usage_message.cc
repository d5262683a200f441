#include "launcher/usage_message.h"

#include <algorithm>
#include <numeric>
#include <string_view>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace shoal {
namespace {

// Levenshtein's: letters to add, drop or change.
size_t EditDistance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t changed = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({changed, row[j - 1] + 1, row[j] + 1});
    }
  }
  return row.back();
}

// "; did you mean NAME?", when one of `names` is near what was typed.
std::string DidYouMean(const std::string& typed, const std::vector<std::string>& names) {
  const std::string* best = nullptr;
  size_t least = std::max<size_t>(1, typed.size() * 2 / 5) + 1;
  for (const std::string& name : names) {
    const size_t distance = EditDistance(typed, name);
    if (distance < least) {
      least = distance;
      best = &name;
    }
  }
  return best != nullptr ? absl::StrCat("; did you mean ", *best, "?") : "";
}

std::vector<std::string> FlagNames(const CLI::App& command) {
  std::vector<std::string> names;
  for (const CLI::Option* option : command.get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  }
  return names;
}

std::string Unexpected(const CLI::App& command, const std::string& word) {
  if (absl::StartsWith(word, "-")) {
    const std::string flag = word.substr(0, word.find('='));
    return absl::StrCat(flag, " is none of its flags", DidYouMean(flag, FlagNames(command)));
  }
  if (absl::EndsWith(word, ".gguf")) {
    return absl::StrCat(word, " is not expected here; a model is given with -m ", word);
  }
  return absl::StrCat("\"", word, "\" is not expected here; put a text of several words in quotes");
}

// The library's words for the same thing, in ours.
std::string Reworded(const CLI::ParseError& error) {
  const std::string what = error.what();
  absl::string_view rest = what;
  if (absl::ConsumePrefix(&rest, "Could not convert: ")) {
    const size_t equals = rest.find(" = ");
    if (equals == absl::string_view::npos) return std::string(rest);
    return absl::StrCat(rest.substr(0, equals), " ", rest.substr(equals + 3),
                        ": this is no number, or none that it takes");
  }
  const size_t colon = rest.find(": 1 required ");
  if (colon != absl::string_view::npos && absl::EndsWith(rest, " missing")) {
    return absl::StrCat(rest.substr(0, colon), " needs a value");
  }
  return what;
}

}  // namespace

std::string UsageMessage(const CLI::App& app, const CLI::ParseError& error, int argc,
                         const char* const* argv) {
  const std::vector<CLI::App*> commands = app.get_subcommands();
  if (!commands.empty()) {
    const CLI::App& command = *commands.front();
    const std::vector<std::string> remaining = app.remaining(/*recurse=*/true);
    const bool extra = dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr;
    const std::string name = absl::StrCat("shoal ", command.get_name());
    return absl::StrCat(
        name, ": ",
        extra && !remaining.empty() ? Unexpected(command, remaining.front()) : Reworded(error),
        "\nTry '", name, " --help'.\n");
  }
  if (argc > 1 && argv[1][0] != '-') {
    std::vector<std::string> names;
    for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
      names.push_back(command->get_name());
    }
    return absl::StrCat("shoal: '", argv[1], "' is not a command", DidYouMean(argv[1], names),
                        "\nTry 'shoal --help'.\n");
  }
  if (argc > 1) {
    return absl::StrCat("shoal: ", argv[1],
                        ": a command comes first, such as run, bench or serve\nTry 'shoal "
                        "--help'.\n");
  }
  return "shoal: say what to do, such as: shoal run -p \"Once upon a time\"\nTry 'shoal --help'.\n";
}

}  // namespace shoal
