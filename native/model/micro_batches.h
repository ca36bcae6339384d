// Micro-batches: the stretches of tokens that a forest is cut into, each of which goes through the model at
// once.
//
// A micro-batch without children is computed by itself. One with children is a segment that all of them see
// whole, such as a motivation or a question: what they need of it stays while they come and go one after
// another. A scoring pass keeps its keys and values. A training pass keeps its activations, and its own
// backward comes last, after the children have left the gradients of its keys and values. So every token is
// computed once, and what is held at once is one path of micro-batches.
#pragma once

#include <cstdint>
#include <vector>

namespace merf {

struct MicroBatch {
  int64_t begin, end;                // tokens
  std::vector<MicroBatch> children;  // their tokens follow `end`
};

// Micro-batches of at most `max_tokens` tokens (0: no bound), as far as segments divide the forest.
// `visible_until` is as in backend.h, nested. Where `joined` [T] is given, token i is in one micro-batch with
// token i - 1 if joined[i].
std::vector<MicroBatch> make_micro_batches(const std::vector<int32_t>& visible_until, int64_t max_tokens,
                                           const std::vector<bool>& joined);

// Tokens of a micro-batch and of all under it.
int64_t tokens_of(const MicroBatch& micro_batch);
// The most tokens that are held at once: those of the longest path of micro-batches.
int64_t tokens_at_once(const std::vector<MicroBatch>& micro_batches);

}  // namespace merf
