// The segments of a packed forest of prompts: stretches of tokens that every completion under them sees
// whole.
#pragma once

#include <cstdint>
#include <vector>

namespace merf {

struct PromptSegment {
  int32_t first_token;
  int32_t tokens;
  int32_t parent;  // segment, or -1
  int32_t end;     // one past the last segment of this one's subtree; segments stand in depth-first order
  int32_t depth;   // tokens before it on its path
};

struct PromptTree {
  std::vector<PromptSegment> segments;
  std::vector<int32_t> prompt_segments;  // [P] the segment that ends with the prompt's last token
};

// `visible_until` [T] as in backend.h, nested; prompt_rows [P] rows of the prompts' last tokens.
PromptTree make_prompt_tree(const std::vector<int32_t>& visible_until,
                            const std::vector<int32_t>& prompt_rows);

// One forward pass of a prefill. Where it is not paged, all that its tokens see is in it; else they attend to
// the cache, which holds what earlier passes and calls computed.
struct PrefillPass {
  bool paged = false;
  std::vector<int32_t> tokens;  // of the forest, rising within a tree
};

struct PrefillLimits {
  int32_t tokens;    // of a pass, at most
  int64_t partials;  // stretches of cached tokens that the tokens of a paged pass attend to, about
};

// The passes that compute of every segment the tokens from `first_computed[segment]` on. Trees that are
// computed whole come first.
std::vector<PrefillPass> split_prefill(const PromptTree& tree, const std::vector<int32_t>& first_computed,
                                       const PrefillLimits& limits);

}  // namespace merf
