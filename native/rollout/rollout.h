// Samples completions for a packed forest of prompts: prefills every distinct prompt token once, then decodes all
// live completions as one batch against a paged key/value cache in which they share their prompts' pages.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "model/model.h"
#include "rollout/stop_strings.h"

namespace merf {

struct SampleRequest {
  std::vector<int32_t> tokens, positions, visible_until;  // [T] the prompts as one forest
  std::vector<int32_t> prompt_rows;                       // [P] row of each prompt's last token
  std::vector<int32_t> counts;                            // [P] completions of each prompt
  std::vector<int32_t> max_tokens;                        // [P] tokens of a completion at most, > 0
  std::vector<uint32_t> keys;  // [2 S] Philox key words of each completion, low word first, prompt-major
  SamplingOptions options;     // options.seed is the other half of the generator's key
  std::vector<int32_t> stop_tokens;  // end a completion and stay in it
  std::vector<std::string> stop_strings;
  int32_t max_live_sequences = 0;  // decoded together at most; 0: kDefaultLiveSequences
  // For what the backward of an update needs (Model::keep) at most; of as many layers as fit.
  int64_t keep_bytes = 0;
  int64_t cache_bytes = 0;  // of keys and values at most, if that holds the prompts and one completion;
                            // 0: a quarter of the device's memory, or half of what is left of it
  // Whether a step is enqueued before the draws of the last one are looked at; else, as suits the device. What is drawn
  // does not depend on it.
  std::optional<bool> ahead;
};

constexpr int32_t kDefaultLiveSequences = 256;

enum class FinishReason : uint8_t { stop_token = 0, length = 1, stop_string = 2, aborted = 3 };

struct SampleResult {
  std::vector<int32_t> offsets;  // [S + 1] into the following
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;      // under the distribution drawn from
  std::vector<float> raw_logprobs;  // under softmax(logits)
  std::vector<float> entropies;     // of softmax(logits)
  std::vector<FinishReason> finish_reasons;
  int64_t prefill_tokens = 0;
  int64_t decode_steps = 0;
  int64_t cache_pages = 0;        // of the cache
  int64_t pages_left_in_use = 0;  // when all was done: 0
  double prefill_seconds = 0.0;
  double decode_seconds = 0.0;
};

// Told of every token drawn, once a step: which completions, their tokens and the tokens' log-probabilities.
using TokenCallback =
    std::function<void(const std::vector<int32_t>& sequences, const std::vector<int32_t>& tokens,
                       const std::vector<float>& logprobs)>;

// A completion ends with a stop token, at a stop string, after max_tokens or at the end of the context. Token i of a
// completion is drawn at counter i of its key, so it does not depend on what else is in the batch. A cancelled call
// returns what was drawn; unfinished completions are marked as aborted. Throws CONTEXT_EXCEEDED where a prompt fills
// the context.
SampleResult sample(Model& model, const TokenBytes& token_bytes, const SampleRequest& request,
                    const Cancel& cancel, const TokenCallback& on_tokens);

}  // namespace merf
