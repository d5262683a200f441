#define OMPI_SKIP_MPICXX 1  // only the C interface: the C++ one needs another library
#include "comm/mpi_version.h"

#include <mpi.h>

#include <string_view>

namespace shoal {

std::string MpiLibraryVersion() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = "";
  int length = 0;
  if (MPI_Get_library_version(text, &length) != MPI_SUCCESS) return "unknown";
  const std::string_view words(text, length);  // "Open MPI v4.1.4, package: ..."
  const size_t begin = words.find(" v");
  if (begin == std::string_view::npos) return std::string(words);
  return std::string(words.substr(begin + 2, words.find(',') - begin - 2));
}

}  // namespace shoal
