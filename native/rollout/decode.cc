#include <algorithm>

#include "rollout/path_runs.h"
#include "rollout/scheduler.h"

namespace merf {
namespace {

// What tells the kernels of one set of options from those of another.
int64_t kinds_of(const SamplingOptions& options) {
  return (options.temperature == 0.0f ? 1 : 0) | (options.top_k > 0 ? 2 : 0) |
         (options.top_p < 1.0f ? 4 : 0) | (options.min_p > 0.0f ? 8 : 0);
}

}  // namespace

void Scheduler::decode() {
  if (activation_cache_) {
    for_each_token(request_.visible_until, [&](int32_t i, int32_t parent) {
      const auto row_of = [&](int32_t token) -> int32_t& {
        return cached_prompt_rows_[static_cast<size_t>(token)];
      };
      row_of(i) = activation_cache_->set(row_of(i), parent < 0 ? -1 : row_of(parent),
                                         request_.tokens[static_cast<size_t>(i)]);
    });
    for (Sequence& sequence : sequences_) {
      const PromptSegment& segment = tree_.segments[static_cast<size_t>(sequence.segment)];
      sequence.cached_row =
          cached_prompt_rows_[static_cast<size_t>(segment.first_token + segment.tokens - 1)];
    }
  }
  for (auto index = order_.rbegin(); index != order_.rend(); ++index) {
    if (!at(*index).finished()) waiting_.push_back(*index);
  }
  if (waiting_.empty()) return;
  max_live_ = std::min(live_.capacity(), waiting_.size());
  const int64_t rows = recorder_.step_rows(static_cast<int64_t>(max_live_));
  buffers_ = model_.transformer().make_activations(arena_, rows, SavedLayers::none);
  staged_ = activation_cache_ && recorder_.records();
  if (staged_) activation_cache_->stage(arena_, rows, buffers_);
  hidden_ = arena_.take(config_.dtype, {rows, config_.hidden_size});
  Step* before = nullptr;
  Step* step = &steps_[0];
  while (!cancel_.requested()) {
    if (before) let_go_of_last();
    admit();
    const bool stepping = !live_.empty();
    bool aborted = false;
    if (stepping) {
      try {
        enqueue(*step);
      } catch (const Error& error) {
        if (error.code != "ABORTED") throw;
        aborted = true;
        // The step has ended between two layers.
        for (const int32_t index : step->sequences) --at(index).fed;
      }
    }
    const auto finish = [&](const Step& done) {
      take_draws(done);
      if (!drawn_.sequences.empty()) ++result_.decode_steps;
      release_unused_segments();
    };
    if (before) finish(*before);
    if (aborted || (!stepping && !before)) return;
    before = stepping ? step : nullptr;
    if (before && !ahead_) {
      finish(*before);
      before = nullptr;
    }
    if (before) step = &steps_[before == &steps_[0] ? 1 : 0];
  }
}

// The completions whose draw on its way is known to be their last.
void Scheduler::let_go_of_last() {
  const auto end = std::remove_if(live_.begin(), live_.end(), [&](int32_t index) {
    Sequence& sequence = at(index);
    if (static_cast<int32_t>(sequence.tokens.size()) + sequence.pending < sequence.max_tokens) return false;
    leave(sequence);
    return true;
  });
  if (end == live_.end()) return;
  live_.erase(end, live_.end());
  live_changed_ = true;
  release_unused_segments();
}

// Lets waiting completions in, in their order, as long as the pages they may come to need can be promised.
void Scheduler::admit() {
  while (!waiting_.empty() && live_.size() < max_live_) {
    const int32_t index = waiting_.back();
    Sequence& sequence = at(index);
    const int32_t pages = sequence.pages_at_most();
    if (pages > session_.available_pages() - promised_pages_) break;
    promised_pages_ += pages;
    sequence.promised = pages;
    sequence.node = session_.open(end_of(place(sequence.segment)), nullptr, 0);
    const size_t reserved = static_cast<size_t>(std::min(sequence.max_tokens, 4096));
    sequence.tokens.reserve(reserved);
    sequence.logprobs.reserve(reserved);
    sequence.sampling_logprobs.reserve(reserved);
    sequence.entropies.reserve(reserved);
    live_.push_back(index);
    waiting_.pop_back();
    live_changed_ = true;
  }
}

// The part of the plan that stays while the same completions are live: the runs of their prompts.
void Scheduler::plan_prompts() {
  start_plan(plan_, static_cast<int64_t>(live_.size()));
  std::vector<Session::Position> ends;
  for (const int32_t index : live_) ends.push_back(session_.parent_of(at(index).node));
  add_path_runs(session_, ends, plan_);
  prompt_runs_ = plan_.runs.size();
  prompt_pages_ = plan_.pages.size();
}

// A step of all live completions. Where they have draws on their way, those are of the step before.
void Scheduler::enqueue(Step& step) {
  // Rows behind those of live completions draw what nobody looks at.
  const int64_t live = static_cast<int64_t>(live_.size()), rows = recorder_.step_rows(live);
  if (live_changed_) {
    plan_prompts();
    buffers_.shrink_to(rows, step_activations_);
    live_changed_ = false;
  }
  step.rows = rows;
  step.sequences = live_;
  plan_.runs.resize(prompt_runs_);
  plan_.pages.resize(prompt_pages_);
  const size_t count = static_cast<size_t>(rows);
  inputs_.assign(6 * count + 2, 0);
  std::fill_n(inputs_.begin(), count, -1);             // token 0
  std::fill_n(inputs_.begin() + 2 * rows, count, -1);  // no slot
  for (int64_t r = 0; r < live; ++r) {
    Sequence& sequence = at(live_[static_cast<size_t>(r)]);
    // The place of the token that is fed.
    const int32_t offset = static_cast<int32_t>(sequence.tokens.size()) + sequence.pending - 1;
    if (offset % kPageTokens == 0) {
      session_.extend(sequence.node);
      --sequence.promised;
      --promised_pages_;
    }
    const size_t row = static_cast<size_t>(r), key = 2 * static_cast<size_t>(sequence.index);
    inputs_[row] = sequence.pending > 0 ? sequence.last_row : -1 - sequence.tokens.back();
    inputs_[count + row] = sequence.prompt_tokens + offset;
    inputs_[2 * count + row] = session_.slot_of(sequence.node, offset);
    inputs_[3 * count + row] = offset + 1;
    inputs_[4 * count + 2 * row] = static_cast<int32_t>(request_.keys[key]);
    inputs_[4 * count + 2 * row + 1] = static_cast<int32_t>(request_.keys[key + 1]);
    add_run(session_, sequence.node, 0, offset + 1, static_cast<int32_t>(r), 1, plan_);
    ++sequence.pending;
    sequence.fed = offset + 1;
    sequence.last_row = static_cast<int32_t>(r);
  }
  if (staged_) {
    step.cached_first = activation_cache_->advance(live);
    inputs_[6 * count] = static_cast<int32_t>(step.cached_first);
    inputs_[6 * count + 1] = static_cast<int32_t>(live);
  } else if (activation_cache_) {
    step_activations_ = activation_cache_->next(rows, step_activations_);
    step.cached_first = activation_cache_->used() - rows;
  }
  const Tensor inputs = backend_.plan_decode(plan_, rows, inputs_);
  // What other kernels run for has another recording.
  const int64_t key = 32 * rows + 2 * kinds_of(request_.options) + (staged_ ? 1 : 0);
  recorder_.run(key, [&] { enqueue_operators(rows, inputs); });
  step.draws->start(outputs_.rows(0, 4 * rows), 4 * count * sizeof(float));
}

// The operators of a step of `rows` rows, from its inputs and the draws of the step before to its own.
void Scheduler::enqueue_operators(int64_t rows, const Tensor& inputs) {
  Transformer& transformer = model_.transformer();
  const Tensor ids = ids_.rows(0, rows);
  Tensor drawn = outputs_;
  drawn.dtype = DType::i32;
  backend_.next_tokens(drawn, inputs.rows(0, rows), ids);
  PagedAttention attention(backend_, transformer.attention_scale(), session_.cache(),
                           inputs.rows(2 * rows, 3 * rows));
  transformer.forward(ids, inputs.rows(rows, 2 * rows), attention, step_activations_, cancel_, "sampling");
  const Tensor hidden = hidden_.rows(0, rows);
  transformer.final_norm(step_activations_.output, hidden, Tensor());
  for (int64_t first = 0; first < rows; first += logits_rows_) {
    const int64_t count = std::min(logits_rows_, rows - first);
    const Tensor logits = logits_.rows(0, count);
    transformer.head(hidden.rows(first, first + count), logits);
    draw(logits, inputs.rows(4 * rows, 6 * rows), inputs.rows(3 * rows, 4 * rows), first, rows);
  }
  if (staged_)
    backend_.store_rows(activation_cache_->copies(step_activations_), inputs.rows(6 * rows, 6 * rows + 2));
}

}  // namespace merf
