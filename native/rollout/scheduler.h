// One call of sample: which completions are decoded together, and when. prefill.cc has how prompts are
// computed, decode.cc how completions are.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "rollout/prompt_tree.h"
#include "rollout/rollout.h"
#include "rollout/session.h"

namespace merf {

// Attends to the cache as planned; the tokens' own keys and values are in it by then.
class PagedAttention final : public AttentionStep {
 public:
  PagedAttention(Backend& backend, float scale, const KvCache& cache, const Tensor& slots)
      : backend_(backend), scale_(scale), cache_(cache), slots_(slots) {}
  CacheSlots cache_slots(int64_t layer) const override { return {&cache_.layer(layer), slots_}; }
  void attend(int64_t layer, const HeadsView& q, const HeadsView&, const HeadsView&, const HeadsView& out,
              const Tensor&, int64_t) override {
    backend_.attention_decode(q, cache_.layer(layer), scale_, out);
  }

 private:
  Backend& backend_;
  float scale_;
  const KvCache& cache_;
  Tensor slots_;
};

class Scheduler {
 public:
  Scheduler(Session& session, const TokenBytes& token_bytes, const SampleRequest& request,
            const Cancel& cancel, const DrawCallback& on_draw);
  SampleResult run();

 private:
  struct Sequence {
    int32_t index = 0;          // among all completions
    int32_t segment = 0;        // the segment of its prompt's last token
    int32_t prompt_tokens = 0;  // on the path to it
    int32_t max_tokens = 0;
    FinishReason reason = FinishReason::pending;
    std::vector<int32_t> tokens;
    std::vector<float> logprobs, sampling_logprobs, entropies;
    int32_t node = -1;     // of the session's, for the tokens that are fed; -1 before and after it is live
    int32_t fed = 0;       // tokens whose keys and values are in it, or will be
    int32_t promised = 0;  // pages that it may still acquire
    bool left = false;     // what it had has been given back
    int32_t pending = 0;   // draws that have been enqueued and not looked at
    int32_t last_row = 0;  // where it stood in the step that was enqueued last
    int32_t cached_row =
        -1;  // of its last token that was fed, or its prompt's last, where the forward is kept
    StopStringMatcher stop_strings;

    // The last token drawn is never fed back.
    int32_t pages_at_most() const { return KvCache::pages_for(max_tokens - 1); }
    bool finished() const { return reason != FinishReason::pending; }
  };

  // A segment of the prompts in the session's tree.
  struct Place {
    int32_t known = 0;           // tokens that the session has
    std::vector<int32_t> nodes;  // that they stand in, pinned as long as the segment has users
    Session::Position known_end;
    int32_t node = -1;     // for the tokens behind them, or -1
    int32_t computed = 0;  // of those, so far
    int32_t users = 0;     // unfinished completions under the segment
    bool pinned = false;
  };

  // A step whose draws have not been looked at yet.
  struct Step {
    int64_t rows = 0;
    std::vector<int32_t> sequences;  // of its first rows
    int64_t cached_first = 0;        // row of what is kept of the first
    std::unique_ptr<Download> draws;
  };

  // ---- scheduler.cc
  // Whether everything that sampling needs is there: not where the call was cancelled.
  bool set_up();
  void make_sequences();
  void find_prompts();
  void make_buffers();
  void make_activation_cache();
  void take_draws(const Step& step);
  [[noreturn]] void refuse_logits(const Sequence& sequence);
  bool push(Sequence& sequence, int32_t token, float sampling_logprob, float logprob, float entropy);
  void leave(Sequence& sequence);
  void release_unused_segments();
  void finish();
  void collect();
  // Draws for the rows of `logits`, which are those from `first` on of a step of `of` rows, as are keys [of,
  // 2] and counters [of].
  void draw(const Tensor& logits, const Tensor& keys, const Tensor& counters, int64_t first, int64_t of);

  // ---- prefill.cc
  std::vector<PrefillPass> plan_prefill();
  // Whether all prompts have been computed: not where the call was cancelled.
  bool prefill();
  void prefill_pass(const PrefillPass& pass);
  void draw_first_tokens(const Tensor& x, const PrefillPass& pass);
  void plan_paged_pass(const PrefillPass& pass);
  Session::Position end_of(const Place& place) const;

  // ---- decode.cc
  void decode();
  void admit();
  void plan_prompts();
  void let_go_of_last();
  void enqueue(Step& step);
  void enqueue_operators(int64_t rows, const Tensor& inputs);

  Sequence& at(int32_t sequence) { return sequences_[static_cast<size_t>(sequence)]; }
  const PromptSegment& segment(int32_t s) const { return tree_.segments[static_cast<size_t>(s)]; }
  Place& place(int32_t s) { return places_[static_cast<size_t>(s)]; }
  const Place& place(int32_t s) const { return places_[static_cast<size_t>(s)]; }

  Session& session_;
  Model& model_;
  Backend& backend_;
  Arena& arena_;
  const ModelConfig& config_;
  const TokenBytes& token_bytes_;
  const SampleRequest& request_;
  const Cancel& cancel_;
  const DrawCallback& on_draw_;
  const PromptTree tree_;

  std::vector<Sequence> sequences_;
  std::vector<int32_t>
      order_;  // sequences by the depth-first order of their prompts: all lists of them are in it
  std::vector<Place> places_;        // by segment
  std::vector<int32_t> segment_of_;  // of every token of the request

  // A step's inputs, which reach the device with the plan: sources, positions, slots, counters (each [rows]),
  // keys [rows, 2], and where what is kept goes [2]. Its outputs: [4, rows].
  std::vector<int32_t> inputs_;
  Tensor outputs_, ids_, logits_, hidden_;
  int64_t logits_rows_ = 0;
  Recorder& recorder_;
  // Whether a step is enqueued before the draws of the last one are looked at. The host knows all of it but
  // the tokens that it is fed, which the device has, and which sequences those end. Such a sequence runs in
  // it in vain.
  const bool ahead_;
  std::array<Step, 2> steps_;

  std::vector<int32_t> waiting_;  // last first
  std::vector<int32_t> live_;
  size_t max_live_ = 0;
  int32_t promised_pages_ = 0;  // that live completions may still acquire
  DecodePlan plan_;
  size_t prompt_runs_ = 0, prompt_pages_ = 0;  // of plan_, which change only with live_
  bool live_changed_ = true;
  Activations buffers_, step_activations_;
  bool staged_ = false;  // what is kept is put into its place at the end of a step
  std::unique_ptr<ActivationCache> activation_cache_;
  std::vector<int32_t> cached_prompt_rows_;  // of the request's tokens

  Drawn drawn_;
  SampleResult result_;
};

}  // namespace merf
