// Samples completions for a packed forest of prompts: prefills every distinct prompt token that the session
// does not have once, then decodes all live completions as one batch against a paged key/value cache in which
// they share their prompts' pages.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "model/model.h"
#include "rollout/session.h"
#include "rollout/stop_strings.h"

namespace merf {

struct SampleRequest {
  // [T] the prompts as one forest; a token's position is the number of those before it on its path
  std::vector<int32_t> tokens, positions, visible_until;
  std::vector<int32_t> prompt_rows;  // [P] row of each prompt's last token
  std::vector<int32_t> counts;       // [P] completions of each prompt
  std::vector<int32_t> max_tokens;   // [P] tokens of a completion at most, > 0
  std::vector<uint32_t> keys;  // [2 S] Philox key words of each completion, low word first, prompt-major
  SamplingOptions options;     // options.seed is the other half of the generator's key
  std::vector<int32_t> stop_tokens;  // end a completion and stay in it
  std::vector<std::string> stop_strings;
  int32_t max_live_sequences = 0;  // decoded together at most; 0: kDefaultLiveSequences
  // For what the backward of an update needs (Model::set_activation_cache) at most; of as many layers as fit.
  // Above 0 every token of the prompts is computed, whether the session has it or not.
  int64_t keep_bytes = 0;
  int64_t cache_bytes = 0;     // of keys and values at most, if that holds the prompts and one completion;
                               // 0: a quarter of the device's memory, or half of what is left of it
  int32_t prefill_tokens = 0;  // in one forward pass at most; 0: kPrefillTokens
  // Whether a step is enqueued before the draws of the last one are looked at; else, as suits the device.
  // What is drawn does not depend on it.
  std::optional<bool> ahead;
};

constexpr int32_t kDefaultLiveSequences = 256;
constexpr int32_t kPrefillTokens = 8192;

// pending: the completion has not ended.
enum class FinishReason : uint8_t { stop_token = 0, length = 1, stop_string = 2, pending = 3 };

struct SampleResult {
  std::vector<int32_t> offsets;  // [S + 1] into the following
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;           // under softmax(logits / temperature), greedy as 1
  std::vector<float> sampling_logprobs;  // under the distribution drawn from
  std::vector<float> entropies;          // of that distribution
  std::vector<FinishReason> finish_reasons;
  int64_t prefilled_tokens = 0;  // of the prompts, that were computed
  int64_t reused_tokens = 0;     // of the prompts, whose keys and values the session had
  int64_t decode_steps = 0;      // that drew something
  int64_t cache_pages = 0;       // of the cache
  int64_t pinned_pages = 0;      // when all was done: 0
  double prefill_seconds = 0.0;
  double decode_seconds = 0.0;
};

// What a step drew: which completions, their tokens, the tokens' log-probabilities under the distribution
// drawn from, and what ended the completion with it, or pending.
struct Drawn {
  std::vector<int32_t> sequences, tokens;
  std::vector<float> sampling_logprobs;
  std::vector<FinishReason> finish_reasons;

  void clear() {
    sequences.clear();
    tokens.clear();
    sampling_logprobs.clear();
    finish_reasons.clear();
  }
};
using DrawCallback = std::function<void(const Drawn&)>;

// A completion ends with a stop token, at a stop string, after max_tokens or at the end of the context. Token
// i of a completion is drawn at counter i of its key, so it does not depend on what else is in the batch. A
// cancelled call returns what was drawn; unfinished completions are pending. Throws CONTEXT_EXCEEDED where a
// prompt fills the context. `on_draw` may be empty, and hears of every token once.
SampleResult sample(Session& session, const TokenBytes& token_bytes, const SampleRequest& request,
                    const Cancel& cancel, const DrawCallback& on_draw);
// In a session that ends with the call.
SampleResult sample(Model& model, const TokenBytes& token_bytes, const SampleRequest& request,
                    const Cancel& cancel, const DrawCallback& on_draw);

}  // namespace merf
