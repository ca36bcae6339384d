#include "rollout/rollout.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <numeric>

#include "backend/in_words.h"
#include "rollout/kv_cache.h"
#include "rollout/prompt_tree.h"

namespace merf {
namespace {

constexpr int32_t kPrefillTokens = 8192;  // in one forward pass, about

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

HeadsView first_rows_off(const HeadsView& x, int64_t rows) {
  HeadsView out = x;
  out.data = static_cast<char*>(x.data) + static_cast<size_t>(rows * x.row_stride) * size_of(x.dtype);
  out.tokens -= rows;
  return out;
}

// Forest attention that also stores keys and values of the tokens from row `first` on.
class PrefillAttention final : public AttentionStep {
 public:
  PrefillAttention(Backend& backend, const Forest& forest, float scale, int64_t first, const Tensor& slots,
                   const KvCache& cache)
      : backend_(backend),
        forest_attention_(backend, forest, scale),
        first_(first),
        slots_(slots),
        cache_(cache) {}
  void attend(int64_t layer, const HeadsView& q, const HeadsView& k, const HeadsView& v, const HeadsView& out,
              const Tensor& lse, int64_t first) override {
    forest_attention_.attend(layer, q, k, v, out, lse, first);
    backend_.cache_write(first_rows_off(k, first_), first_rows_off(v, first_), slots_,
                         cache_.layers[static_cast<size_t>(layer)]);
  }

 private:
  Backend& backend_;
  ForestAttention forest_attention_;
  int64_t first_;
  const Tensor& slots_;
  const KvCache& cache_;
};

// Attends to what was planned; the new tokens' keys and values are in the cache by then.
class DecodeAttention final : public AttentionStep {
 public:
  DecodeAttention(Backend& backend, float scale, const KvCache& cache, const Tensor& slots)
      : backend_(backend), scale_(scale), cache_(cache), slots_(slots) {}
  CacheSlots cache_slots(int64_t layer) const override {
    return {&cache_.layers[static_cast<size_t>(layer)], slots_};
  }
  void attend(int64_t layer, const HeadsView& q, const HeadsView&, const HeadsView&, const HeadsView& out,
              const Tensor&, int64_t) override {
    backend_.attention_decode(q, cache_.layers[static_cast<size_t>(layer)], scale_, out);
  }

 private:
  Backend& backend_;
  float scale_;
  const KvCache& cache_;
  Tensor slots_;
};

struct Sequence {
  int32_t index = 0;          // among all completions
  int32_t segment = 0;        // the segment of its prompt's last token
  int32_t prompt_tokens = 0;  // on the path to it
  int32_t max_tokens = 0;
  FinishReason reason = FinishReason::aborted;
  std::vector<int32_t> tokens;
  std::vector<float> logprobs, raw_logprobs, entropies;
  std::vector<int32_t> pages;  // of its own tokens
  int32_t promised = 0;        // pages that it may still acquire
  bool left = false;           // what it had has been given back
  int32_t pending = 0;         // draws that have been enqueued and not looked at
  int32_t last_row = 0;        // where it stood in the step that was enqueued last
  int32_t kept_row = -1;  // of its last token that was fed, or its prompt's last, where the forward is kept
  StopStringMatcher stop_strings;

  // The last token drawn is never fed back.
  int32_t pages_at_most() const { return KvCache::pages_for(max_tokens - 1); }
  bool finished() const { return reason != FinishReason::aborted; }
};

// What tells the kernels of one set of options from those of another.
int64_t kinds_of(const SamplingOptions& options) {
  return (options.temperature == 0.0f ? 1 : 0) | (options.top_k > 0 ? 2 : 0) |
         (options.top_p < 1.0f ? 4 : 0) | (options.min_p > 0.0f ? 8 : 0);
}

class Sampler {
 public:
  Sampler(Model& model, const TokenBytes& token_bytes, const SampleRequest& request, const Cancel& cancel,
          const TokenCallback& on_tokens)
      : model_(model),
        backend_(model.backend()),
        arena_(model.arena()),
        config_(model.config()),
        token_bytes_(token_bytes),
        request_(request),
        cancel_(cancel),
        on_tokens_(on_tokens),
        tree_(make_prompt_tree(request.visible_until, request.prompt_rows)),
        recorder_(model.recorder()),
        ahead_(request.ahead.value_or(model.backend().info().asynchronous)) {
    recorder_.renew();
    make_sequences();
  }

  SampleResult run() {
    model_.prepare();
    arena_.reset();
    make_buffers();
    make_kept();
    const auto prefill_start = Clock::now();
    const bool prefilled = prefill();
    release_unused_segments();
    result_.prefill_seconds = seconds_since(prefill_start);
    const auto decode_start = Clock::now();
    if (prefilled) decode();
    result_.decode_seconds = seconds_since(decode_start);
    finish_aborted();
    model_.set_activation_cache(std::move(kept_));
    collect();
    return std::move(result_);
  }

 private:
  void make_sequences();
  void make_buffers();
  void make_kept();
  bool prefill();
  void prefill_pass(const PrefillPass& pass);
  void draw_first_tokens(const Tensor& x, const PrefillPass& pass);
  void decode();
  void admit();
  void plan_prompts();
  void let_go_of_last();
  struct Step;
  void enqueue(Step& step);
  void enqueue_operators(int64_t rows, const Tensor& inputs);
  void draw(const Tensor& logits, const Tensor& keys, const Tensor& counters, int64_t first, int64_t of);
  void take_draws(const Step& step);
  bool push(Sequence& sequence, int32_t token, float logprob, float raw_logprob, float entropy);
  void leave(Sequence& sequence);
  void release_unused_segments();
  void finish_aborted();
  void collect();

  Sequence& at(int32_t sequence) { return sequences_[static_cast<size_t>(sequence)]; }

  Model& model_;
  Backend& backend_;
  Arena& arena_;
  const ModelConfig& config_;
  const TokenBytes& token_bytes_;
  const SampleRequest& request_;
  const Cancel& cancel_;
  const TokenCallback& on_tokens_;
  const PromptTree tree_;

  std::vector<Sequence> sequences_;
  std::vector<int32_t>
      order_;  // sequences by the depth-first order of their prompts: all lists of them are in it
  std::vector<std::vector<int32_t>> segment_pages_;
  std::vector<int32_t> segment_users_;  // unfinished completions under each segment
  std::unique_ptr<KvCache> cache_;

  // A step whose draws have not been looked at yet.
  struct Step {
    int64_t rows = 0;
    std::vector<int32_t> sequences;  // of its first rows
    int64_t kept_first = 0;          // row of what is kept of the first
    std::unique_ptr<Download> draws;
  };
  // A step's inputs, which reach the device with the plan: sources, positions, slots, counters (each [rows]), keys
  // [rows, 2], and where what is kept goes [2]. Its outputs: [4, rows].
  std::vector<int32_t> inputs_;
  Tensor outputs_, ids_, logits_, hidden_;
  int64_t logits_rows_ = 0;
  Recorder& recorder_;
  // Whether a step is enqueued before the draws of the last one are looked at. The host knows all of it but the tokens
  // that it is fed, which the device has, and which sequences those end. Such a sequence runs in it in vain.
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
  std::unique_ptr<ActivationCache> kept_;
  std::vector<int32_t> kept_prompt_rows_;  // of the request's tokens

  std::vector<int32_t> drawn_sequences_, drawn_tokens_;
  std::vector<float> drawn_logprobs_;
  SampleResult result_;
};

void Sampler::make_sequences() {
  int32_t index = 0;
  for (size_t p = 0; p < request_.prompt_rows.size(); ++p) {
    const int32_t prompt_tokens = request_.positions[static_cast<size_t>(request_.prompt_rows[p])] + 1;
    const int64_t room = config_.max_positions - prompt_tokens;
    if (room < 1 && request_.counts[p] > 0) {
      throw Error("CONTEXT_EXCEEDED", "Expected prompts of fewer tokens than the context's " +
                                          std::to_string(config_.max_positions) + " but received " +
                                          std::to_string(prompt_tokens) + " in prompt " + std::to_string(p));
    }
    for (int32_t i = 0; i < request_.counts[p]; ++i) {
      Sequence sequence;
      sequence.index = index++;
      sequence.segment = tree_.prompt_segments[p];
      sequence.prompt_tokens = prompt_tokens;
      sequence.max_tokens = static_cast<int32_t>(std::min<int64_t>(request_.max_tokens[p], room));
      const size_t reserved = static_cast<size_t>(std::min(sequence.max_tokens, 4096));
      sequence.tokens.reserve(reserved);
      sequence.logprobs.reserve(reserved);
      sequence.raw_logprobs.reserve(reserved);
      sequence.entropies.reserve(reserved);
      sequences_.push_back(std::move(sequence));
    }
  }
  order_.resize(sequences_.size());
  std::iota(order_.begin(), order_.end(), 0);
  std::stable_sort(order_.begin(), order_.end(),
                   [&](int32_t a, int32_t b) { return at(a).segment < at(b).segment; });

  segment_pages_.resize(tree_.segments.size());
  segment_users_.assign(tree_.segments.size(), 0);
  for (const Sequence& sequence : sequences_) {
    for (int32_t s = sequence.segment; s >= 0; s = tree_.segments[static_cast<size_t>(s)].parent) {
      ++segment_users_[static_cast<size_t>(s)];
    }
  }
}

void Sampler::make_buffers() {
  const int64_t sequences = static_cast<int64_t>(sequences_.size());
  const int64_t limit = request_.max_live_sequences > 0 ? request_.max_live_sequences : kDefaultLiveSequences;
  const int64_t live = std::min(sequences, limit);

  int64_t prompt_pages = 0, longest = 0, wanted = 0;
  for (const PromptSegment& segment : tree_.segments) prompt_pages += KvCache::pages_for(segment.tokens);
  for (const Sequence& sequence : sequences_) {
    longest = std::max<int64_t>(longest, sequence.pages_at_most());
    wanted += sequence.pages_at_most();
  }
  const int64_t page_bytes = KvCache::page_bytes(config_);
  const int64_t memory = backend_.info().memory_bytes;
  // Others may have memory of the device too.
  const int64_t free = backend_.memory_free() + static_cast<int64_t>(arena_.held());
  const int64_t bytes =
      request_.cache_bytes > 0
          ? request_.cache_bytes
          : std::max<int64_t>(0, std::min({memory / 4, (memory - backend_.memory_used()) / 2, free / 4 * 3}));
  const int64_t pages = std::max(
      prompt_pages + longest, std::min(prompt_pages + std::min(wanted, live * longest), bytes / page_bytes));
  cache_ = std::make_unique<KvCache>(arena_, config_, static_cast<int32_t>(std::max<int64_t>(pages, 1)));
  result_.cache_pages = pages;

  const int64_t rows = std::max<int64_t>(live, 1);
  logits_rows_ = std::clamp<int64_t>(backend_.info().logits_bytes / (4 * config_.vocab_size), 8,
                                     std::max<int64_t>(rows, 8));
  logits_ = arena_.take(DType::f32, {logits_rows_, config_.vocab_size});
  const int64_t step_rows = std::max(recorder_.step_rows(rows), logits_rows_);
  outputs_ = arena_.take(DType::f32, {4 * step_rows});
  ids_ = arena_.take(DType::i32, {step_rows});
  for (Step& step : steps_) step.draws = backend_.make_download(outputs_.bytes());
  live_.reserve(static_cast<size_t>(rows));
}

void Sampler::make_kept() {
  std::unique_ptr<ActivationCache> before = model_.take_activation_cache();
  if (request_.keep_bytes == 0) return;
  int64_t rows = 0;
  for (const PrefillPass& pass : split_prefill(request_.visible_until, kPrefillTokens)) {
    rows += static_cast<int64_t>(pass.ancestors.size()) + pass.end - pass.begin;
  }
  for (const Sequence& sequence : sequences_) rows += sequence.max_tokens - 1;
  try {
    std::vector<Tensor> gradients = model_.borrow_gradients();
    const auto within = [&](int64_t count) {
      return ActivationCache::layers_within(request_.keep_bytes, config_, count, gradients);
    };
    // New memory costs time, so there is room for the next prompts, which may be a little longer, and what there is serves
    // where it is not much less than could be.
    const int64_t roomy = rows + rows / 16;
    const size_t layers = within(roomy);
    if (layers == 0) return;
    kept_prompt_rows_.assign(request_.tokens.size(), -1);
    if (before && before->borrows() == !gradients.empty() && before->rows() >= rows &&
        8 * before->layers() >= 7 * layers && before->layers() <= within(before->rows())) {
      kept_ = std::move(before);
      kept_->clear();
      return;
    }
    before.reset();
    kept_ = std::make_unique<ActivationCache>(backend_, config_, roomy, layers, std::move(gradients));
  } catch (const Error& error) {
    if (error.code != "OUT_OF_MEMORY") throw;
  }
}

bool Sampler::prefill() {
  for (size_t s = 0; s < tree_.segments.size(); ++s) {
    for (int32_t page = KvCache::pages_for(tree_.segments[s].tokens); page > 0; --page) {
      segment_pages_[s].push_back(cache_->pages.acquire());
    }
  }
  for (const PrefillPass& pass : split_prefill(request_.visible_until, kPrefillTokens)) {
    if (cancel_.requested()) return false;
    ArenaScope scope(arena_);
    try {
      prefill_pass(pass);
    } catch (const Error& error) {
      if (error.code == "ABORTED") return false;
      throw;
    }
  }
  return true;
}

void Sampler::prefill_pass(const PrefillPass& pass) {
  const int32_t ancestors = static_cast<int32_t>(pass.ancestors.size());
  std::vector<int32_t> tokens, positions, visible_until, slots;
  const auto add = [&](int32_t i) {
    const size_t from = static_cast<size_t>(i);
    tokens.push_back(request_.tokens[from]);
    positions.push_back(request_.positions[from]);
    visible_until.push_back(std::min(request_.visible_until[from], pass.end) - pass.begin + ancestors);
  };
  for (int32_t i : pass.ancestors) add(i);
  for (int32_t i = pass.begin; i < pass.end; ++i) add(i);
  for (size_t s = 0; s < tree_.segments.size(); ++s) {
    const PromptSegment& segment = tree_.segments[s];
    const int32_t first = std::max(pass.begin, segment.first_token);
    const int32_t last = std::min(pass.end, segment.first_token + segment.tokens);
    for (int32_t i = first; i < last; ++i) {
      const int32_t offset = i - segment.first_token;
      slots.push_back(segment_pages_[s][static_cast<size_t>(offset / kPageTokens)] *
                          static_cast<int32_t>(kPageTokens) +
                      offset % static_cast<int32_t>(kPageTokens));
    }
  }
  const Forest forest = model_.upload_forest(tokens, positions, visible_until);
  const Tensor device_slots = model_.upload(slots);
  Transformer& transformer = model_.transformer();
  Activations activations = transformer.make_activations(arena_, forest.tokens, SavedLayers::none);
  if (kept_) {
    activations = kept_->next(forest.tokens, activations);
    const int64_t first = kept_->used() - (pass.end - pass.begin);
    for (int32_t i = pass.begin; i < pass.end; ++i) {
      kept_prompt_rows_[static_cast<size_t>(i)] = static_cast<int32_t>(first + i - pass.begin);
    }
  }
  PrefillAttention attention(backend_, forest, transformer.attention_scale(), ancestors, device_slots,
                             *cache_);
  transformer.forward(forest.ids, forest.positions, attention, activations, cancel_, "sampling");
  result_.prefill_tokens += forest.tokens;
  draw_first_tokens(activations.output, pass);
}

// The first token of every completion whose prompt ends in this pass; completions of one prompt share one row of
// logits.
void Sampler::draw_first_tokens(const Tensor& x, const PrefillPass& pass) {
  const int32_t ancestors = static_cast<int32_t>(pass.ancestors.size());
  struct Source {
    int32_t row;
    std::vector<int32_t> sequences;
  };
  std::vector<Source> sources;
  for (int32_t index : order_) {
    const PromptSegment& segment = tree_.segments[static_cast<size_t>(at(index).segment)];
    const int32_t row = segment.first_token + segment.tokens - 1;
    if (row < pass.begin || row >= pass.end) continue;
    const int32_t local = row - pass.begin + ancestors;
    if (sources.empty() || sources.back().row != local) sources.push_back({local, {}});
    sources.back().sequences.push_back(index);
  }
  Transformer& transformer = model_.transformer();
  for (size_t begin = 0; begin < sources.size(); begin += static_cast<size_t>(logits_rows_)) {
    ArenaScope scope(arena_);
    const size_t end = std::min(sources.size(), begin + static_cast<size_t>(logits_rows_));
    const int64_t count = static_cast<int64_t>(end - begin);
    std::vector<int32_t> rows, sequences, logits_row;
    for (size_t i = begin; i < end; ++i) {
      rows.push_back(sources[i].row);
      for (int32_t sequence : sources[i].sequences) {
        sequences.push_back(sequence);
        logits_row.push_back(static_cast<int32_t>(i - begin));
      }
    }
    const Tensor gathered = arena_.take(DType::f32, {count, config_.hidden_size});
    const Tensor hidden = arena_.take(config_.dtype, {count, config_.hidden_size});
    backend_.gather_rows(x, model_.upload(rows), gathered);
    transformer.final_norm(gathered, hidden, Tensor());
    const Tensor logits = logits_.rows(0, count);
    transformer.head(hidden, logits);

    const Tensor repeated = arena_.take(DType::f32, {logits_rows_, config_.vocab_size});
    for (size_t first = 0; first < sequences.size(); first += static_cast<size_t>(logits_rows_)) {
      ArenaScope block(arena_);
      const size_t last = std::min(sequences.size(), first + static_cast<size_t>(logits_rows_));
      const int64_t draws = static_cast<int64_t>(last - first);
      Step& step = steps_[0];
      step.rows = draws;
      std::vector<int32_t>& drawn = step.sequences;
      drawn.assign(sequences.begin() + static_cast<std::ptrdiff_t>(first),
                   sequences.begin() + static_cast<std::ptrdiff_t>(last));
      const std::vector<int32_t> repeats(logits_row.begin() + static_cast<std::ptrdiff_t>(first),
                                         logits_row.begin() + static_cast<std::ptrdiff_t>(last));
      const Tensor block_logits = repeated.rows(0, draws);
      backend_.gather_rows(logits, model_.upload(repeats), block_logits);

      std::vector<int32_t> keys;
      for (const int32_t index : drawn) {
        const size_t key = 2 * static_cast<size_t>(index);
        keys.push_back(static_cast<int32_t>(request_.keys[key]));
        keys.push_back(static_cast<int32_t>(request_.keys[key + 1]));
      }
      const Tensor counters = model_.upload(std::vector<int32_t>(drawn.size(), 0));
      draw(block_logits, model_.upload(keys), counters, 0, draws);
      step.draws->start(outputs_.rows(0, 4 * draws), 4 * static_cast<size_t>(draws) * sizeof(float));
      take_draws(step);
    }
  }
}

// Draws for the rows of `logits`, which are those from `first` on of a step of `of` rows, as are keys [of, 2] and
// counters [of].
void Sampler::draw(const Tensor& logits, const Tensor& keys, const Tensor& counters, int64_t first,
                   int64_t of) {
  const int64_t end = first + logits.shape[0];
  const auto output = [&](int64_t i) { return outputs_.rows(i * of + first, i * of + end); };
  Tensor tokens = output(0);
  tokens.dtype = DType::i32;
  backend_.sample_tokens(logits, keys.view({of, 2}).rows(first, end), counters.rows(first, end),
                         request_.options, tokens, output(1), output(2), output(3));
}

// Waits for a step's draws and appends them.
void Sampler::take_draws(const Step& step) {
  const size_t rows = static_cast<size_t>(step.rows);
  const float* const outputs = static_cast<const float*>(step.draws->wait());
  const int32_t* const tokens = reinterpret_cast<const int32_t*>(outputs);
  drawn_sequences_.clear();
  drawn_tokens_.clear();
  drawn_logprobs_.clear();
  bool finished = false;
  for (size_t r = 0; r < step.sequences.size(); ++r) {
    Sequence& sequence = at(step.sequences[r]);
    // The draw before was its last.
    if (sequence.finished()) continue;
    sequence.pending = std::max(sequence.pending - 1, 0);
    if (kept_ && !sequence.tokens.empty()) {
      sequence.kept_row =
          kept_->set(step.kept_first + static_cast<int64_t>(r), sequence.kept_row, sequence.tokens.back());
    }
    drawn_sequences_.push_back(step.sequences[r]);
    drawn_tokens_.push_back(tokens[r]);
    drawn_logprobs_.push_back(outputs[rows + r]);
    if (push(sequence, tokens[r], outputs[rows + r], outputs[2 * rows + r], outputs[3 * rows + r])) {
      leave(sequence);
      finished = true;
    }
  }
  if (finished) {
    const auto end =
        std::remove_if(live_.begin(), live_.end(), [&](int32_t index) { return at(index).finished(); });
    live_changed_ = live_changed_ || end != live_.end();
    live_.erase(end, live_.end());
  }
  if (on_tokens_ && !drawn_sequences_.empty()) on_tokens_(drawn_sequences_, drawn_tokens_, drawn_logprobs_);
}

// Appends a token; whether it was the last.
bool Sampler::push(Sequence& sequence, int32_t token, float logprob, float raw_logprob, float entropy) {
  sequence.tokens.push_back(token);
  sequence.logprobs.push_back(logprob);
  sequence.raw_logprobs.push_back(raw_logprob);
  sequence.entropies.push_back(entropy);
  const auto& stops = request_.stop_tokens;
  if (std::find(stops.begin(), stops.end(), token) != stops.end()) {
    sequence.reason = FinishReason::stop_token;
  } else if (sequence.stop_strings.push(token_bytes_.of(token), request_.stop_strings)) {
    sequence.reason = FinishReason::stop_string;
  } else if (static_cast<int32_t>(sequence.tokens.size()) >= sequence.max_tokens) {
    sequence.reason = FinishReason::length;
  } else {
    return false;
  }
  return true;
}

// Gives back a completion's pages and what it was promised; release_unused_segments then does those of the segments that
// nobody is under any more. What is enqueued already may still use them: whoever has them next comes behind it.
void Sampler::leave(Sequence& sequence) {
  if (sequence.left) return;
  sequence.left = true;
  for (int32_t page : sequence.pages) cache_->pages.release(page);
  sequence.pages.clear();
  promised_pages_ -= sequence.promised;
  for (int32_t s = sequence.segment; s >= 0; s = tree_.segments[static_cast<size_t>(s)].parent) {
    --segment_users_[static_cast<size_t>(s)];
  }
}

void Sampler::release_unused_segments() {
  for (size_t s = 0; s < segment_pages_.size(); ++s) {
    if (segment_users_[s] > 0) continue;
    for (int32_t page : segment_pages_[s]) cache_->pages.release(page);
    segment_pages_[s].clear();
  }
}

void Sampler::decode() {
  if (kept_) {
    for_each_token(request_.visible_until, [&](int32_t i, int32_t parent) {
      const auto row_of = [&](int32_t token) -> int32_t& {
        return kept_prompt_rows_[static_cast<size_t>(token)];
      };
      row_of(i) =
          kept_->set(row_of(i), parent < 0 ? -1 : row_of(parent), request_.tokens[static_cast<size_t>(i)]);
    });
    for (Sequence& sequence : sequences_) {
      const PromptSegment& segment = tree_.segments[static_cast<size_t>(sequence.segment)];
      sequence.kept_row = kept_prompt_rows_[static_cast<size_t>(segment.first_token + segment.tokens - 1)];
    }
  }
  for (auto index = order_.rbegin(); index != order_.rend(); ++index) {
    if (!at(*index).finished()) waiting_.push_back(*index);
  }
  if (waiting_.empty()) return;
  max_live_ = std::min(live_.capacity(), waiting_.size());
  const int64_t rows = recorder_.step_rows(static_cast<int64_t>(max_live_));
  buffers_ = model_.transformer().make_activations(arena_, rows, SavedLayers::none);
  staged_ = kept_ && recorder_.records();
  if (staged_) kept_->stage(arena_, rows, buffers_);
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
      }
    }
    const auto finish = [&](const Step& done) {
      take_draws(done);
      if (!drawn_sequences_.empty()) ++result_.decode_steps;
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
void Sampler::let_go_of_last() {
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
void Sampler::admit() {
  while (!waiting_.empty() && live_.size() < max_live_) {
    const int32_t index = waiting_.back();
    const int32_t pages = at(index).pages_at_most();
    if (pages > cache_->pages.available() - promised_pages_) break;
    promised_pages_ += pages;
    at(index).promised = pages;
    live_.push_back(index);
    waiting_.pop_back();
    live_changed_ = true;
  }
}

// The part of the plan that stays while the same completions are live: the runs of prompt segments. Live completions
// stand in the depth-first order of their prompts, so those under a segment are neighbours.
void Sampler::plan_prompts() {
  plan_.runs.clear();
  plan_.pages.clear();
  plan_.rows.resize(live_.size());
  std::iota(plan_.rows.begin(), plan_.rows.end(), 0);
  const auto first_row_from = [&](int32_t segment) {
    const auto it = std::lower_bound(live_.begin(), live_.end(), segment,
                                     [&](int32_t index, int32_t s) { return at(index).segment < s; });
    return static_cast<int32_t>(it - live_.begin());
  };
  for (size_t s = 0; s < tree_.segments.size(); ++s) {
    if (segment_users_[s] == 0) continue;
    const PromptSegment& segment = tree_.segments[s];
    const int32_t first = first_row_from(static_cast<int32_t>(s)), last = first_row_from(segment.end);
    if (first == last) continue;
    plan_.runs.push_back({static_cast<int32_t>(plan_.pages.size()), segment.tokens, first, last - first});
    plan_.pages.insert(plan_.pages.end(), segment_pages_[s].begin(), segment_pages_[s].end());
  }
  prompt_runs_ = plan_.runs.size();
  prompt_pages_ = plan_.pages.size();
}

// A step of all live completions. Where they have draws on their way, those are of the step before.
void Sampler::enqueue(Step& step) {
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
      sequence.pages.push_back(cache_->pages.acquire());
      --sequence.promised;
      --promised_pages_;
    }
    const size_t row = static_cast<size_t>(r), key = 2 * static_cast<size_t>(sequence.index);
    inputs_[row] = sequence.pending > 0 ? sequence.last_row : -1 - sequence.tokens.back();
    inputs_[count + row] = sequence.prompt_tokens + offset;
    inputs_[2 * count + row] = sequence.pages.back() * static_cast<int32_t>(kPageTokens) +
                               offset % static_cast<int32_t>(kPageTokens);
    inputs_[3 * count + row] = offset + 1;
    inputs_[4 * count + 2 * row] = static_cast<int32_t>(request_.keys[key]);
    inputs_[4 * count + 2 * row + 1] = static_cast<int32_t>(request_.keys[key + 1]);
    plan_.runs.push_back({static_cast<int32_t>(plan_.pages.size()), offset + 1, static_cast<int32_t>(r), 1});
    plan_.pages.insert(plan_.pages.end(), sequence.pages.begin(), sequence.pages.end());
    ++sequence.pending;
    sequence.last_row = static_cast<int32_t>(r);
  }
  if (staged_) {
    step.kept_first = kept_->advance(live);
    inputs_[6 * count] = static_cast<int32_t>(step.kept_first);
    inputs_[6 * count + 1] = static_cast<int32_t>(live);
  } else if (kept_) {
    step_activations_ = kept_->next(rows, step_activations_);
    step.kept_first = kept_->used() - rows;
  }
  const Tensor inputs = backend_.plan_decode(plan_, rows, inputs_);
  // What other kernels run for has another recording.
  const int64_t key = 32 * rows + 2 * kinds_of(request_.options) + (staged_ ? 1 : 0);
  recorder_.run(key, [&] { enqueue_operators(rows, inputs); });
  step.draws->start(outputs_.rows(0, 4 * rows), 4 * count * sizeof(float));
}

// The operators of a step of `rows` rows, from its inputs and the draws of the step before to its own.
void Sampler::enqueue_operators(int64_t rows, const Tensor& inputs) {
  Transformer& transformer = model_.transformer();
  const Tensor ids = ids_.rows(0, rows);
  Tensor drawn = outputs_;
  drawn.dtype = DType::i32;
  backend_.next_tokens(drawn, inputs.rows(0, rows), ids);
  DecodeAttention attention(backend_, transformer.attention_scale(), *cache_,
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
  if (staged_) backend_.store_rows(kept_->copies(step_activations_), inputs.rows(6 * rows, 6 * rows + 2));
}

void Sampler::finish_aborted() {
  for (Sequence& sequence : sequences_) {
    if (!sequence.finished()) leave(sequence);
  }
  release_unused_segments();
  result_.pages_left_in_use = cache_->pages.total() - cache_->pages.available();
}

void Sampler::collect() {
  size_t total = 0;
  for (const Sequence& sequence : sequences_) total += sequence.tokens.size();
  result_.tokens.reserve(total);
  result_.logprobs.reserve(total);
  result_.raw_logprobs.reserve(total);
  result_.entropies.reserve(total);
  result_.offsets.push_back(0);
  const auto append = [](auto& to, const auto& from) { to.insert(to.end(), from.begin(), from.end()); };
  for (const Sequence& sequence : sequences_) {
    append(result_.tokens, sequence.tokens);
    append(result_.logprobs, sequence.logprobs);
    append(result_.raw_logprobs, sequence.raw_logprobs);
    append(result_.entropies, sequence.entropies);
    result_.offsets.push_back(static_cast<int32_t>(result_.tokens.size()));
    result_.finish_reasons.push_back(sequence.reason);
  }
}

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

SampleResult sample(Model& model, const TokenBytes& token_bytes, const SampleRequest& request,
                    const Cancel& cancel, const TokenCallback& on_tokens) {
  try {
    return Sampler(model, token_bytes, request, cancel, on_tokens).run();
  } catch (const Error& error) {
    if (error.code != "OUT_OF_MEMORY") throw;
    throw out_of_memory(error, model, request);
  }
}

}  // namespace merf
