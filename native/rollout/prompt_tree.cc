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
      tree.segments.push_back({i, 0, path.empty() ? -1 : path.back(), 0});
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

std::vector<PrefillPass> split_prefill(const std::vector<int32_t>& visible_until, int32_t budget) {
  const int32_t tokens = static_cast<int32_t>(visible_until.size());
  // seen[e]: how many tokens before e are visible to token e.
  std::vector<int32_t> seen(visible_until.size() + 1, 0);
  for (int32_t j = 0; j < tokens; ++j) {
    ++seen[static_cast<size_t>(j) + 1];
    --seen[static_cast<size_t>(visible_until[static_cast<size_t>(j)])];
  }
  int32_t sum = 0;
  for (int32_t& s : seen) s = sum += s;
  seen[static_cast<size_t>(tokens)] = 0;

  std::vector<PrefillPass> passes;
  for (int32_t begin = 0; begin < tokens;) {
    PrefillPass pass;
    pass.begin = begin;
    for (int32_t j = 0; j < begin; ++j) {
      if (visible_until[static_cast<size_t>(j)] > begin) pass.ancestors.push_back(j);
    }
    const auto cheap = [&](int32_t e) { return seen[static_cast<size_t>(e)] <= budget / 4; };
    const int64_t limit = int64_t{begin} + budget - static_cast<int64_t>(pass.ancestors.size());
    int32_t end = static_cast<int32_t>(std::min<int64_t>(tokens, std::max<int64_t>(limit, begin + 1)));
    const int32_t wanted = end;
    while (end > begin && !cheap(end)) --end;
    if (end == begin) {
      end = wanted;
      while (!cheap(end)) ++end;
    }
    pass.end = end;
    passes.push_back(std::move(pass));
    begin = end;
  }
  return passes;
}

}  // namespace merf
