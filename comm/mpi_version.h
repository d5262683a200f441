// The Open MPI that this program was linked with and finds at run time.
#pragma once

#include <string>

namespace shoal {

// "4.1.4"; the library's own words when they hold no such number. MPI need not be initialized.
std::string MpiLibraryVersion();

}  // namespace shoal
