#include "rollout/scheduler.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <tuple>

namespace merf {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

Scheduler::Scheduler(Session& session, const TokenBytes& token_bytes, const SampleRequest& request,
                     const Cancel& cancel, const DrawCallback& on_draw)
    : session_(session),
      model_(session.model()),
      backend_(model_.backend()),
      arena_(model_.arena()),
      config_(model_.config()),
      token_bytes_(token_bytes),
      request_(request),
      cancel_(cancel),
      on_draw_(on_draw),
      tree_(make_prompt_tree(request.visible_until, request.prompt_rows)),
      recorder_(model_.recorder()),
      ahead_(request.ahead.value_or(backend_.info().asynchronous)) {
  recorder_.renew();
  make_sequences();
}

SampleResult Scheduler::run() {
  session_.begin();
  const bool ready = set_up();
  const auto prefill_start = Clock::now();
  const bool prefilled = ready && prefill();
  release_unused_segments();
  result_.prefill_seconds = seconds_since(prefill_start);
  const auto decode_start = Clock::now();
  if (prefilled) decode();
  result_.decode_seconds = seconds_since(decode_start);
  finish();
  model_.set_activation_cache(std::move(activation_cache_));
  collect();
  return std::move(result_);
}

bool Scheduler::set_up() {
  try {
    model_.prepare(&cancel_);
  } catch (const Error& error) {
    if (error.code != "ABORTED") throw;
    return false;
  }
  arena_.reset();
  find_prompts();
  if (cancel_.requested()) return false;
  make_buffers();
  if (cancel_.requested()) return false;
  make_activation_cache();
  return true;
}

void Scheduler::make_sequences() {
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
      sequences_.push_back(std::move(sequence));
    }
  }
  order_.resize(sequences_.size());
  std::iota(order_.begin(), order_.end(), 0);
  std::stable_sort(order_.begin(), order_.end(),
                   [&](int32_t a, int32_t b) { return at(a).segment < at(b).segment; });

  places_.resize(tree_.segments.size());
  for (const Sequence& sequence : sequences_) {
    for (int32_t s = sequence.segment; s >= 0; s = segment(s).parent) ++place(s).users;
  }
  segment_of_.resize(request_.tokens.size());
  for (size_t s = 0; s < tree_.segments.size(); ++s) {
    const auto& [first, tokens, parent, end, depth] = tree_.segments[s];
    for (int32_t i = 0; i < tokens; ++i) {
      const size_t token = static_cast<size_t>(first + i);
      segment_of_[token] = static_cast<int32_t>(s);
      if (request_.positions[token] == depth + i) continue;
      throw Error("INVALID_ARGUMENT", "Expected position " + std::to_string(depth + i) + " for token " +
                                          std::to_string(token) + " of the prompts but received " +
                                          std::to_string(request_.positions[token]));
    }
  }
}

// Pins what the session has of the prompts.
void Scheduler::find_prompts() {
  for (size_t s = 0; s < tree_.segments.size(); ++s) {
    const PromptSegment& own = tree_.segments[s];
    Place& place = places_[s];
    place.known = 0;
    place.nodes.clear();
    place.known_end = Session::Position();
    place.pinned = true;
    if (own.parent >= 0) {
      const Place& above = places_[static_cast<size_t>(own.parent)];
      if (above.known < segment(own.parent).tokens) continue;
      place.known_end = above.known_end;
    }
    std::tie(place.known_end, place.known) =
        session_.follow(place.known_end, request_.tokens.data() + own.first_token, own.tokens, place.nodes);
    for (const int32_t node : place.nodes) session_.pin(node);
  }
}

void Scheduler::make_buffers() {
  const int64_t sequences = static_cast<int64_t>(sequences_.size());
  const int64_t limit = request_.max_live_sequences > 0 ? request_.max_live_sequences : kDefaultLiveSequences;
  const int64_t live = std::min(sequences, limit);

  int64_t longest = 0, wanted = 0;
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
  const auto reserve = [&] {
    int64_t prompt_pages = session_.pinned_pages();
    for (size_t s = 0; s < tree_.segments.size(); ++s) {
      prompt_pages += KvCache::pages_for(tree_.segments[s].tokens - places_[s].known);
    }
    const int64_t least = prompt_pages + longest, most = prompt_pages + std::min(wanted, live * longest);
    // And what may be wanted again.
    const int64_t stays = std::min(session_.unpinned_pages(), session_.pages_to_keep());
    session_.reserve(
        static_cast<int32_t>(std::max<int64_t>({least, std::min(most + stays, bytes / page_bytes), 1})));
  };
  try {
    reserve();
  } catch (const Error& error) {
    if (error.code != "OUT_OF_MEMORY" || session_.pages() == 0) throw;
    session_.clear();
    find_prompts();
    reserve();
  }
  result_.cache_pages = session_.pages();
  for (size_t s = 0; s < tree_.segments.size(); ++s) {
    const PromptSegment& own = tree_.segments[s];
    Place& place = places_[s];
    if (place.known == own.tokens) continue;
    if (own.parent >= 0 && place.known == 0) place.known_end = end_of(this->place(own.parent));
    place.node = session_.open(place.known_end, request_.tokens.data() + own.first_token + place.known,
                               own.tokens - place.known);
  }

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

// Where what hangs behind a segment hangs.
Session::Position Scheduler::end_of(const Place& place) const {
  if (place.node < 0) return place.known_end;
  const int32_t segment = static_cast<int32_t>(&place - places_.data());
  return {place.node, this->segment(segment).tokens - place.known};
}

void Scheduler::make_activation_cache() {
  std::unique_ptr<ActivationCache> before = model_.take_activation_cache();
  if (request_.keep_bytes == 0) return;
  int64_t rows = static_cast<int64_t>(request_.tokens.size());
  for (const Sequence& sequence : sequences_) rows += sequence.max_tokens - 1;
  try {
    std::vector<Tensor> gradients = model_.borrow_gradients();
    const auto within = [&](int64_t count) {
      return ActivationCache::layers_within(request_.keep_bytes, config_, count, gradients);
    };
    // New memory costs time, so there is room for the next prompts, which may be a little longer. How many
    // layers are cached depends on the request alone, and not on the memory that earlier ones have left: the
    // last bits of gradients may depend on it, and a resumed run has no earlier requests.
    const int64_t roomy = rows + rows / 16;
    const size_t layers = within(roomy);
    if (layers == 0) return;
    cached_prompt_rows_.assign(request_.tokens.size(), -1);
    if (before && before->borrows() == !gradients.empty() && before->rows() >= rows &&
        before->room() >= layers && before->room() <= within(before->rows())) {
      activation_cache_ = std::move(before);
      activation_cache_->clear();
      activation_cache_->use(layers);
      return;
    }
    before.reset();
    activation_cache_ =
        std::make_unique<ActivationCache>(backend_, config_, roomy, layers, std::move(gradients));
  } catch (const Error& error) {
    if (error.code != "OUT_OF_MEMORY") throw;
  }
}

void Scheduler::draw(const Tensor& logits, const Tensor& keys, const Tensor& counters, int64_t first,
                     int64_t of) {
  const int64_t end = first + logits.shape[0];
  const auto output = [&](int64_t i) { return outputs_.rows(i * of + first, i * of + end); };
  Tensor tokens = output(0);
  tokens.dtype = DType::i32;
  backend_.sample_tokens(logits, keys.view({of, 2}).rows(first, end), counters.rows(first, end),
                         request_.options, tokens, output(1), output(2), output(3));
}

// Waits for a step's draws and appends them.
void Scheduler::take_draws(const Step& step) {
  const size_t rows = static_cast<size_t>(step.rows);
  const float* const outputs = static_cast<const float*>(step.draws->wait());
  const int32_t* const tokens = reinterpret_cast<const int32_t*>(outputs);
  drawn_.clear();
  bool finished = false;
  for (size_t r = 0; r < step.sequences.size(); ++r) {
    Sequence& sequence = at(step.sequences[r]);
    // The draw before was its last.
    if (sequence.finished()) continue;
    sequence.pending = std::max(sequence.pending - 1, 0);
    if (activation_cache_ && !sequence.tokens.empty()) {
      sequence.cached_row = activation_cache_->set(step.cached_first + static_cast<int64_t>(r),
                                                   sequence.cached_row, sequence.tokens.back());
    }
    if (std::isnan(outputs[2 * rows + r])) refuse_logits(sequence);
    if (push(sequence, tokens[r], outputs[rows + r], outputs[2 * rows + r], outputs[3 * rows + r])) {
      leave(sequence);
      finished = true;
    }
    drawn_.sequences.push_back(step.sequences[r]);
    drawn_.tokens.push_back(tokens[r]);
    drawn_.sampling_logprobs.push_back(outputs[rows + r]);
    drawn_.finish_reasons.push_back(sequence.reason);
  }
  if (finished) {
    const auto end =
        std::remove_if(live_.begin(), live_.end(), [&](int32_t index) { return at(index).finished(); });
    live_changed_ = live_changed_ || end != live_.end();
    live_.erase(end, live_.end());
  }
  if (on_draw_ && !drawn_.sequences.empty()) on_draw_(drawn_);
}

// A row of logits without a distribution has NaN for its log-probability (cpu/sampling.cc).
void Scheduler::refuse_logits(const Sequence& sequence) {
  // A step may be on its way, whose results nobody will wait for.
  backend_.synchronize();
  int32_t prompt = 0, within = sequence.index;
  while (within >= request_.counts[static_cast<size_t>(prompt)]) {
    within -= request_.counts[static_cast<size_t>(prompt++)];
  }
  throw Error("NON_FINITE", "Expected finite logits but received NaN, Infinity or nothing finite for token " +
                                std::to_string(sequence.tokens.size()) + " of completion " +
                                std::to_string(within) + " of prompt " + std::to_string(prompt) +
                                ": the model's weights or its activations have overflowed");
}

// Appends a token; whether it was the last.
bool Scheduler::push(Sequence& sequence, int32_t token, float sampling_logprob, float logprob,
                     float entropy) {
  sequence.tokens.push_back(token);
  sequence.logprobs.push_back(logprob);
  sequence.sampling_logprobs.push_back(sampling_logprob);
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

// Leaves the session what a completion had and gives back what it was promised; release_unused_segments then
// does so for the segments that nobody is under any more. What is enqueued already may still use pages that
// are given up: whoever has them next comes behind it.
void Scheduler::leave(Sequence& sequence) {
  if (sequence.left) return;
  sequence.left = true;
  if (sequence.node >= 0) {
    const int32_t known = static_cast<int32_t>(sequence.tokens.size());
    session_.close(sequence.node, sequence.tokens.data(), std::min(sequence.fed, known));
    sequence.node = -1;
  }
  promised_pages_ -= sequence.promised;
  for (int32_t s = sequence.segment; s >= 0; s = segment(s).parent) --place(s).users;
}

void Scheduler::release_unused_segments() {
  // What is below goes first, so that it is given up first.
  for (size_t s = places_.size(); s-- > 0;) {
    Place& place = places_[s];
    if (place.users > 0 || !place.pinned) continue;
    place.pinned = false;
    if (place.node >= 0) {
      const PromptSegment& own = tree_.segments[s];
      session_.close(place.node, request_.tokens.data() + own.first_token + place.known, place.computed);
    }
    for (size_t i = place.nodes.size(); i-- > 0;) session_.unpin(place.nodes[i]);
  }
}

void Scheduler::finish() {
  for (Sequence& sequence : sequences_) {
    if (!sequence.finished()) leave(sequence);
  }
  release_unused_segments();
  result_.pinned_pages = session_.pinned_pages();
  session_.end();
}

void Scheduler::collect() {
  size_t total = 0;
  for (const Sequence& sequence : sequences_) total += sequence.tokens.size();
  result_.tokens.reserve(total);
  result_.logprobs.reserve(total);
  result_.sampling_logprobs.reserve(total);
  result_.entropies.reserve(total);
  result_.offsets.push_back(0);
  const auto append = [](auto& to, const auto& from) { to.insert(to.end(), from.begin(), from.end()); };
  for (const Sequence& sequence : sequences_) {
    append(result_.tokens, sequence.tokens);
    append(result_.logprobs, sequence.logprobs);
    append(result_.sampling_logprobs, sequence.sampling_logprobs);
    append(result_.entropies, sequence.entropies);
    result_.offsets.push_back(static_cast<int32_t>(result_.tokens.size()));
    result_.finish_reasons.push_back(sequence.reason);
  }
}

}  // namespace merf
