// Finds stop strings in the bytes of the tokens sampled so far.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace merf {

// The bytes that each token stands for: token t's are [offsets[t], offsets[t + 1]) of `bytes`.
struct TokenBytes {
  std::string bytes;
  std::vector<int32_t> offsets;

  std::string_view of(int32_t token) const {
    const size_t t = static_cast<size_t>(token);
    if (t + 1 >= offsets.size()) return {};
    return std::string_view(bytes).substr(static_cast<size_t>(offsets[t]),
                                          static_cast<size_t>(offsets[t + 1] - offsets[t]));
  }
};

// What one completion has to remember: as many of its last bytes as the beginning of a stop string could
// take.
class StopStringMatcher {
 public:
  // Whether `strings` (none of them empty) contains one that ends within the bytes of the next token.
  bool push(std::string_view token, const std::vector<std::string>& strings) {
    if (strings.empty()) return false;
    tail_.append(token);
    size_t longest = 0;
    for (const std::string& s : strings) {
      if (tail_.find(s) != std::string::npos) return true;
      longest = std::max(longest, s.size());
    }
    if (tail_.size() >= longest) tail_.erase(0, tail_.size() - (longest - 1));
    return false;
  }

 private:
  std::string tail_;
};

}  // namespace merf
