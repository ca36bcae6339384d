#include "model/frames.h"

#include <algorithm>

namespace merf {
namespace {

// Every frame holds the keys and values of all above it.
constexpr int kDeepest = 64;

class Cutter {
 public:
  Cutter(const std::vector<int32_t>& visible_until, int64_t max_tokens, const std::vector<bool>& joined)
      : visible_until_(visible_until), max_tokens_(max_tokens), joined_(joined) {}

  // Of the trees that stand in [begin, end).
  std::vector<Frame> cut(int64_t begin, int64_t end, int depth) const {
    std::vector<Frame> frames;
    while (begin < end) {
      const int64_t tree = end_of(begin), segment = end_of_segment(begin);
      if (tree - begin > max_tokens_ && segment < tree && depth < kDeepest && !joined(segment) &&
          (tree == end || !joined(tree))) {
        frames.push_back({begin, segment, cut(segment, tree, depth + 1)});
        begin = tree;
        continue;
      }
      int64_t last = tree;
      while (last < end && (joined(last) || end_of(last) - begin <= max_tokens_)) last = end_of(last);
      frames.push_back({begin, last, {}});
      begin = last;
    }
    return frames;
  }

 private:
  int64_t end_of(int64_t token) const { return visible_until_[static_cast<size_t>(token)]; }
  int64_t end_of_segment(int64_t begin) const {
    int64_t end = begin;
    while (end < end_of(begin) && end_of(end) == end_of(begin)) ++end;
    return end;
  }
  bool joined(int64_t token) const { return !joined_.empty() && joined_[static_cast<size_t>(token)]; }

  const std::vector<int32_t>& visible_until_;
  const int64_t max_tokens_;
  const std::vector<bool>& joined_;
};

}  // namespace

std::vector<Frame> make_frames(const std::vector<int32_t>& visible_until, int64_t max_tokens,
                               const std::vector<bool>& joined) {
  const auto tokens = static_cast<int64_t>(visible_until.size());
  if (max_tokens == 0) return {{0, tokens, {}}};
  return Cutter(visible_until, max_tokens, joined).cut(0, tokens, 0);
}

int64_t tokens_of(const Frame& frame) {
  int64_t tokens = frame.end - frame.begin;
  for (const Frame& child : frame.children) tokens += tokens_of(child);
  return tokens;
}

int64_t tokens_at_once(const std::vector<Frame>& frames) {
  int64_t most = 0;
  for (const Frame& frame : frames) {
    most = std::max(most, frame.end - frame.begin + tokens_at_once(frame.children));
  }
  return most;
}

}  // namespace merf
