// How a forest is cut into frames, the stretches of tokens whose activations are held at once.
//
// A frame without children is trained on by itself: forward, loss, backward. One with children is a segment that all
// of them see whole, such as a motivation or a question: its activations stay while its children come and go one after
// another and leave the gradients of its keys and values, and its own backward comes last. So every token is computed
// once, and what is held is one path and one group of its leaves.
#pragma once

#include <cstdint>
#include <vector>

namespace merf {

struct Frame {
  int64_t begin, end;           // tokens
  std::vector<Frame> children;  // which follow `end`
};

// Frames of at most `max_tokens` tokens (0: no bound) as far as segments divide it. `visible_until` as in backend.h,
// nested. Where `joined` [T] is given, token i is in one frame with token i - 1 if joined[i].
std::vector<Frame> make_frames(const std::vector<int32_t>& visible_until, int64_t max_tokens,
                               const std::vector<bool>& joined);

// Those of a frame and of all under it.
int64_t tokens_of(const Frame& frame);
// The most tokens whose activations are held at once: of a path of frames.
int64_t tokens_at_once(const std::vector<Frame>& frames);

}  // namespace merf
