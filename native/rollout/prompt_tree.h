// The segments of a packed forest of prompts: stretches of tokens that every completion under them sees whole. A
// segment's keys and values fill pages of their own, which all of those completions share.
#pragma once

#include <cstdint>
#include <vector>

namespace merf {

struct PromptSegment {
  int32_t first_token;
  int32_t tokens;
  int32_t parent;  // segment, or -1
  int32_t end;     // one past the last segment of this one's subtree; segments stand in depth-first order
};

struct PromptTree {
  std::vector<PromptSegment> segments;
  std::vector<int32_t> prompt_segments;  // [P] the segment that ends with the prompt's last token
};

// `visible_until` [T] as in backend.h, nested; prompt_rows [P] rows of the prompts' last tokens.
PromptTree make_prompt_tree(const std::vector<int32_t>& visible_until,
                            const std::vector<int32_t>& prompt_rows);

// One forward pass of a prefill: the tokens [begin, end), after those before them that they see.
struct PrefillPass {
  std::vector<int32_t> ancestors;  // computed again, since attention takes keys of the same pass only
  int32_t begin;
  int32_t end;
};

// Splits the forest into passes of about `budget` tokens, where little has to be computed again: a pass grows over
// its budget rather than end where more than a quarter of it would be repeated.
std::vector<PrefillPass> split_prefill(const std::vector<int32_t>& visible_until, int32_t budget);

}  // namespace merf
