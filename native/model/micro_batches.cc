#include "model/micro_batches.h"

#include <algorithm>

namespace merf {
namespace {

// A micro-batch holds copies of the keys and values of all above it, so that paths must not become long.
constexpr int kDeepest = 64;

class Cutter {
 public:
  Cutter(const std::vector<int32_t>& visible_until, int64_t max_tokens, const std::vector<bool>& joined)
      : visible_until_(visible_until), max_tokens_(max_tokens), joined_(joined) {}

  // Cuts the trees that stand in [begin, end).
  std::vector<MicroBatch> cut(int64_t begin, int64_t end, int depth) const {
    std::vector<MicroBatch> micro_batches;
    while (begin < end) {
      const int64_t tree = end_of(begin), segment = end_of_segment(begin);
      if (tree - begin > max_tokens_ && segment < tree && depth < kDeepest && !joined(segment) &&
          (tree == end || !joined(tree))) {
        micro_batches.push_back({begin, segment, cut(segment, tree, depth + 1)});
        begin = tree;
        continue;
      }
      int64_t last = tree;
      while (last < end && (joined(last) || end_of(last) - begin <= max_tokens_)) last = end_of(last);
      micro_batches.push_back({begin, last, {}});
      begin = last;
    }
    return micro_batches;
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

std::vector<MicroBatch> make_micro_batches(const std::vector<int32_t>& visible_until, int64_t max_tokens,
                                           const std::vector<bool>& joined) {
  const auto tokens = static_cast<int64_t>(visible_until.size());
  if (max_tokens == 0) return {{0, tokens, {}}};
  return Cutter(visible_until, max_tokens, joined).cut(0, tokens, 0);
}

int64_t tokens_of(const MicroBatch& micro_batch) {
  int64_t tokens = micro_batch.end - micro_batch.begin;
  for (const MicroBatch& child : micro_batch.children) tokens += tokens_of(child);
  return tokens;
}

int64_t tokens_at_once(const std::vector<MicroBatch>& micro_batches) {
  int64_t most = 0;
  for (const MicroBatch& micro_batch : micro_batches) {
    most = std::max(most, micro_batch.end - micro_batch.begin + tokens_at_once(micro_batch.children));
  }
  return most;
}

}  // namespace merf
