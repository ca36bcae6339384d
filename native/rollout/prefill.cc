#include <algorithm>

#include "rollout/path_runs.h"
#include "rollout/scheduler.h"

namespace merf {
namespace {

// What the softmaxes of a paged pass may take, which a device keeps for each stretch of 256 cached tokens of
// a row.
constexpr int64_t kPartialBytes = int64_t{128} << 20;

// Forest attention that also stores keys and values.
class PrefillAttention final : public AttentionStep {
 public:
  PrefillAttention(Backend& backend, const Forest& forest, float scale, const Tensor& slots,
                   const KvCache& cache)
      : backend_(backend), forest_attention_(backend, forest, scale), slots_(slots), cache_(cache) {}
  void attend(int64_t layer, const HeadsView& q, const HeadsView& k, const HeadsView& v, const HeadsView& out,
              const Tensor& lse, int64_t first) override {
    forest_attention_.attend(layer, q, k, v, out, lse, first);
    backend_.cache_write(k, v, slots_, cache_.layer(layer));
  }

 private:
  Backend& backend_;
  ForestAttention forest_attention_;
  const Tensor& slots_;
  const KvCache& cache_;
};

}  // namespace

std::vector<PrefillPass> Scheduler::plan_prefill() {
  std::vector<int32_t> first_computed(places_.size(), 0);
  if (!activation_cache_) {
    for (size_t s = 0; s < places_.size(); ++s) first_computed[s] = places_[s].known;
    // A prompt's last token is there for what comes next.
    for (const Sequence& sequence : sequences_) {
      const size_t s = static_cast<size_t>(sequence.segment);
      first_computed[s] = std::min(first_computed[s], tree_.segments[s].tokens - 1);
    }
  }
  for (const int32_t known : first_computed) result_.reused_tokens += known;
  const int64_t partial_bytes = config_.heads * (config_.head_size + 2) * static_cast<int64_t>(sizeof(float));
  const int32_t tokens = request_.prefill_tokens > 0 ? request_.prefill_tokens : kPrefillTokens;
  return split_prefill(tree_, first_computed, {tokens, kPartialBytes / partial_bytes});
}

bool Scheduler::prefill() {
  for (const PrefillPass& pass : plan_prefill()) {
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

void Scheduler::prefill_pass(const PrefillPass& pass) {
  const size_t count = pass.tokens.size();
  std::vector<int32_t> tokens, positions, visible_until, slots;
  for (const int32_t i : pass.tokens) {
    const size_t from = static_cast<size_t>(i);
    const Place& place = this->place(segment_of_[from]);
    const int32_t behind = i - segment(segment_of_[from]).first_token - place.known;
    tokens.push_back(request_.tokens[from]);
    positions.push_back(request_.positions[from]);
    // Keys and values that the session has stay as they are.
    slots.push_back(behind < 0 ? -1 : session_.slot_of(place.node, behind));
    if (pass.paged) continue;
    // Trees that are computed whole stand here as they stand in the forest; the last may go on in another
    // pass.
    const size_t until = visible_until.size() + static_cast<size_t>(request_.visible_until[from] - i);
    visible_until.push_back(static_cast<int32_t>(std::min(until, count)));
  }
  const Tensor ids = model_.upload(tokens), device_positions = model_.upload(positions);
  const Tensor device_slots = model_.upload(slots);
  Transformer& transformer = model_.transformer();
  Activations activations =
      transformer.make_activations(arena_, static_cast<int64_t>(count), SavedLayers::none);
  if (activation_cache_) {
    activations = activation_cache_->next(static_cast<int64_t>(count), activations);
    const int64_t first = activation_cache_->used() - static_cast<int64_t>(count);
    for (size_t i = 0; i < count; ++i) {
      cached_prompt_rows_[static_cast<size_t>(pass.tokens[i])] =
          static_cast<int32_t>(first + static_cast<int64_t>(i));
    }
  }
  const float scale = transformer.attention_scale();
  if (pass.paged) {
    plan_paged_pass(pass);
    PagedAttention attention(backend_, scale, session_.cache(), device_slots);
    transformer.forward(ids, device_positions, attention, activations, cancel_, "sampling");
  } else {
    Forest forest;
    forest.tokens = static_cast<int64_t>(count);
    forest.visible_until = model_.upload(visible_until);
    forest.visible_until_host = std::move(visible_until);
    PrefillAttention attention(backend_, forest, scale, device_slots, session_.cache());
    transformer.forward(ids, device_positions, attention, activations, cancel_, "sampling");
  }
  result_.prefilled_tokens += static_cast<int64_t>(count);
  for (const int32_t i : pass.tokens) {
    Place& place = this->place(segment_of_[static_cast<size_t>(i)]);
    if (i - segment(segment_of_[static_cast<size_t>(i)]).first_token >= place.known) ++place.computed;
  }
  draw_first_tokens(activations.output, pass);
}

// Every token attends to what is before it on its path and to itself.
void Scheduler::plan_paged_pass(const PrefillPass& pass) {
  start_plan(plan_, static_cast<int64_t>(pass.tokens.size()));
  std::vector<Session::Position> ends;
  struct Stretch {
    int32_t node, first_token, first_row, count;
  };
  std::vector<Stretch> stretches;  // of neighbours in nodes that are being computed
  for (const int32_t i : pass.tokens) {
    const int32_t s = segment_of_[static_cast<size_t>(i)];
    const Place& place = this->place(s);
    const int32_t behind = i - segment(s).first_token - place.known, row = static_cast<int32_t>(ends.size());
    if (behind >= 0) {
      ends.push_back(place.known_end);
      const bool continues = !stretches.empty() && stretches.back().node == place.node &&
                             stretches.back().first_token + stretches.back().count == behind;
      if (continues) {
        ++stretches.back().count;
      } else {
        stretches.push_back({place.node, behind, row, 1});
      }
      continue;
    }
    // One that is known: so far on the path to the segment's end.
    int32_t left = request_.positions[static_cast<size_t>(i)] + 1;
    for (Session::Position position : session_.path_to(place.known_end)) {
      if (position.tokens >= left) {
        ends.push_back({position.node, left});
        break;
      }
      left -= position.tokens;
    }
  }
  add_path_runs(session_, ends, plan_);
  for (const auto& [node, first_token, first_row, count] : stretches) {
    add_causal_runs(session_, node, first_token, first_row, count, plan_);
  }
  backend_.plan_decode(plan_, static_cast<int64_t>(pass.tokens.size()));
}

// The first token of every completion whose prompt ends in this pass; completions of one prompt share one row
// of logits.
void Scheduler::draw_first_tokens(const Tensor& x, const PrefillPass& pass) {
  struct Source {
    int32_t row;
    std::vector<int32_t> sequences;
  };
  std::vector<int32_t> row_of(request_.tokens.size(), -1);
  for (size_t row = 0; row < pass.tokens.size(); ++row) {
    row_of[static_cast<size_t>(pass.tokens[row])] = static_cast<int32_t>(row);
  }
  std::vector<Source> sources;
  for (int32_t index : order_) {
    const PromptSegment& own = segment(at(index).segment);
    const int32_t row = row_of[static_cast<size_t>(own.first_token + own.tokens - 1)];
    if (row < 0) continue;
    if (sources.empty() || sources.back().row != row) sources.push_back({row, {}});
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
      cancel_.check("sampling");
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

}  // namespace merf
