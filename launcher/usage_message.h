// What a person reads who typed a command that does not exist or does not parse.
#pragma once

#include <string>

#include "CLI/CLI.hpp"

namespace shoal {

// Lines for stderr, the last one names the help that tells more. `app` has just thrown `error` from
// parse(argc, argv).
std::string UsageMessage(const CLI::App& app, const CLI::ParseError& error, int argc,
                         const char* const* argv);

}  // namespace shoal
