// Sizes as messages say them.
#pragma once

#include <cstddef>
#include <string>

namespace merf {

inline std::string in_words(size_t bytes) {
  if (bytes < (size_t{10} << 20)) return std::to_string(bytes) + " bytes";
  return std::to_string(bytes >> 20) + " MiB";
}

}  // namespace merf
