#include "rollout/rollout.h"

#include <algorithm>
#include <numeric>

#include "backend/in_words.h"
#include "rollout/scheduler.h"

namespace merf {
namespace {

// Gives the memory of the cache and of activations back, and says what would have fitted.
Error out_of_memory(const Error& error, Model& model, const SampleRequest& request) {
  Backend& backend = model.backend();
  model.arena().free();
  backend.synchronize();
  const int64_t tokens = static_cast<int64_t>(request.tokens.size());
  const ModelConfig& config = model.config();
  // What the prompts and one completion need: pages of the cache, and a forward over a part of the prompts.
  int64_t longest = 0;
  for (const int32_t most : request.max_tokens) longest = std::max<int64_t>(longest, most);
  longest = std::min(longest, config.max_positions);
  const int64_t per_token = KvCache::page_bytes(config) / kPageTokens;
  const int64_t sequences = std::accumulate(request.counts.begin(), request.counts.end(), int64_t{8});
  const int64_t logits = 2 * std::min(backend.info().logits_bytes, 4 * config.vocab_size * sequences);
  const int64_t fixed = longest * per_token + logits;
  Arena counted;
  model.transformer().make_activations(counted, std::min<int64_t>(tokens, kPrefillTokens), SavedLayers::none);
  const int64_t activations = static_cast<int64_t>(counted.taken());
  const int64_t fit =
      count_that_fits(tokens, tokens * per_token + activations, backend.memory_free() - fixed);
  return Error("OUT_OF_MEMORY",
               std::string(error.what()) + ". Prompts of " + std::to_string(tokens) +
                   " tokens and completions of up to " + std::to_string(longest) + " need at least " +
                   in_words(static_cast<size_t>(tokens * per_token + activations + fixed)) + "; " +
                   (fit > 0 ? "prompts of about " + std::to_string(fit) + " tokens" : std::string("none")) +
                   " would fit");
}

}  // namespace

SampleResult sample(Session& session, const TokenBytes& token_bytes, const SampleRequest& request,
                    const Cancel& cancel, const DrawCallback& on_draw) {
  Model& model = session.model();
  bool told = false;
  DrawCallback tell;
  if (on_draw) {
    tell = [&](const Drawn& drawn) {
      told = true;
      on_draw(drawn);
    };
  }
  for (bool again = session.bytes() > 0;; again = false) {
    try {
      return Scheduler(session, token_bytes, request, cancel, tell).run();
    } catch (const Error& error) {
      session.clear();
      if (error.code != "OUT_OF_MEMORY") throw;
      if (!again || told) throw out_of_memory(error, model, request);
      // Without what was kept there may be enough.
      model.arena().free();
    }
  }
}

SampleResult sample(Model& model, const TokenBytes& token_bytes, const SampleRequest& request,
                    const Cancel& cancel, const DrawCallback& on_draw) {
  Session session(model, 0);
  return sample(session, token_bytes, request, cancel, on_draw);
}

}  // namespace merf
