#include "rollout/prompt_tree.h"

#include <algorithm>

namespace merf {

PromptTree make_prompt_tree(const std::vector<int32_t>& visible_until,
                            const std::vector<int32_t>& prompt_rows) {
  const int32_t tokens = static_cast<int32_t>(visible_until.size());
  std::vector<bool> ends_prompt(visible_until.size(), false);
  for (int32_t row : prompt_rows) ends_prompt[static_cast<size_t>(row)] = true;

  PromptTree tree;
  std::vector<int32_t> segment_of(visible_until.size());
  std::vector<int32_t> path;
  for (int32_t i = 0; i < tokens; ++i) {
    const size_t at = static_cast<size_t>(i);
    const bool continues = i > 0 && visible_until[at] == visible_until[at - 1] && !ends_prompt[at - 1];
    if (!continues) {
      const int32_t segment = static_cast<int32_t>(tree.segments.size());
      while (!path.empty()) {
        PromptSegment& last = tree.segments[static_cast<size_t>(path.back())];
        if (visible_until[static_cast<size_t>(last.first_token)] > i) break;
        last.end = segment;
        path.pop_back();
      }
      const int32_t parent = path.empty() ? -1 : path.back();
      int32_t depth = 0;
      if (parent >= 0) {
        const PromptSegment& above = tree.segments[static_cast<size_t>(parent)];
        depth = above.depth + above.tokens;
      }
      tree.segments.push_back({i, 0, parent, 0, depth});
      path.push_back(segment);
    }
    ++tree.segments.back().tokens;
    segment_of[at] = static_cast<int32_t>(tree.segments.size()) - 1;
  }
  for (int32_t segment : path) {
    tree.segments[static_cast<size_t>(segment)].end = static_cast<int32_t>(tree.segments.size());
  }
  for (int32_t row : prompt_rows) tree.prompt_segments.push_back(segment_of[static_cast<size_t>(row)]);
  return tree;
}

std::vector<PrefillPass> split_prefill(const PromptTree& tree, const std::vector<int32_t>& first_computed,
                                       const PrefillLimits& limits) {
  const size_t most = static_cast<size_t>(limits.tokens);
  std::vector<PrefillPass> passes;
  std::vector<int32_t> waiting, partials;  // tokens of paged passes, and how many stretches each attends to
  PrefillPass whole;
  const auto flush = [&] {
    if (!whole.tokens.empty()) passes.push_back(std::move(whole));
    whole = {};
  };
  const int32_t segments = static_cast<int32_t>(tree.segments.size());
  for (const bool fresh : {true, false}) {
    for (int32_t root = 0; root < segments; root = tree.segments[static_cast<size_t>(root)].end) {
      if ((first_computed[static_cast<size_t>(root)] == 0) != fresh) continue;
      std::vector<int32_t> tokens, stretches;
      std::vector<int32_t> path;
      for (int32_t s = root; s < tree.segments[static_cast<size_t>(root)].end; ++s) {
        const PromptSegment& segment = tree.segments[static_cast<size_t>(s)];
        while (!path.empty() && path.back() != segment.parent) path.pop_back();
        path.push_back(s);
        for (int32_t i = first_computed[static_cast<size_t>(s)]; i < segment.tokens; ++i) {
          tokens.push_back(segment.first_token + i);
          // Stretches of 256 tokens that lie before it, and ends of segments and pages.
          stretches.push_back((segment.depth + i) / 256 + static_cast<int32_t>(path.size()) + 1);
        }
      }
      size_t first = 0;  // token of a paged pass
      if (fresh) {
        if (whole.tokens.size() + tokens.size() > most) flush();
        first = std::min(tokens.size(), most);
        whole.tokens.insert(whole.tokens.end(), tokens.begin(),
                            tokens.begin() + static_cast<std::ptrdiff_t>(first));
      }
      waiting.insert(waiting.end(), tokens.begin() + static_cast<std::ptrdiff_t>(first), tokens.end());
      partials.insert(partials.end(), stretches.begin() + static_cast<std::ptrdiff_t>(first),
                      stretches.end());
    }
    flush();
  }
  for (size_t begin = 0; begin < waiting.size();) {
    PrefillPass& pass = passes.emplace_back();
    pass.paged = true;
    size_t end = begin;
    for (int64_t sum = 0; end < waiting.size() && end - begin < most; ++end) {
      sum += partials[end];
      if (end > begin && sum > limits.partials) break;
    }
    pass.tokens.assign(waiting.begin() + static_cast<std::ptrdiff_t>(begin),
                       waiting.begin() + static_cast<std::ptrdiff_t>(end));
    begin = end;
  }
  return passes;
}

}  // namespace merf
