#include "model/model.h"

#include <algorithm>
#include <cmath>
#include <unordered_set>

#include "backend/in_words.h"
#include "backend/philox.h"
#include "model/gradient_pass.h"

namespace merf {
namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// Element `index` of the stream of standard normal numbers that belongs to (seed, stream): Box-Muller on Philox.
void fill_normal(uint64_t seed, uint32_t stream, int64_t first, float scale, std::vector<float>& out) {
  const PhiloxKey key{{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}};
  const int64_t quads = static_cast<int64_t>(out.size() + 3) / 4;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < quads; ++i) {
    const uint64_t counter = static_cast<uint64_t>(first / 4 + i);
    const PhiloxWords words = philox4x32_10(
        {{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), stream, 0x6d657266u}}, key);
    for (int pair = 0; pair < 2; ++pair) {
      const float u = (static_cast<float>(words.word[2 * pair] >> 8) + 0.5f) * 0x1p-24f;
      const float angle = static_cast<float>(words.word[2 * pair + 1] >> 8) * 0x1p-24f * 6.28318531f;
      const float radius = scale * std::sqrt(-2.0f * std::log(u));
      const size_t at = static_cast<size_t>(4 * i + 2 * pair);
      if (at < out.size()) out[at] = radius * std::cos(angle);
      if (at + 1 < out.size()) out[at + 1] = radius * std::sin(angle);
    }
  }
}

// Whether each token stands behind the first and not behind the last token that rows of one sequence start from: such
// rows share a ratio, so they stay in one frame.
std::vector<bool> within_sequences(const Batch& batch, const std::vector<int32_t>& sequences) {
  std::vector<bool> within(batch.tokens.size(), false);
  for (size_t begin = 0, end = 0; begin < sequences.size(); begin = end) {
    while (end < sequences.size() && sequences[end] == sequences[begin]) ++end;
    const auto [first, last] =
        std::minmax_element(batch.source_rows.begin() + static_cast<std::ptrdiff_t>(begin),
                            batch.source_rows.begin() + static_cast<std::ptrdiff_t>(end));
    std::fill(within.begin() + *first + 1, within.begin() + *last + 1, true);
  }
  return within;
}

// The batch without tokens that no loss row depends on, such as every completion's last.
Batch without_idle_tokens(const Batch& batch) {
  const size_t tokens = batch.tokens.size();
  // last[i]: the furthest loss row at or behind token i.
  std::vector<int32_t> rows(batch.source_rows);
  std::sort(rows.begin(), rows.end());
  Batch out;
  out.targets = batch.targets;
  std::vector<int32_t> place(tokens + 1);  // how many tokens before this one stay
  for (size_t i = 0; i < tokens; ++i) {
    place[i] = static_cast<int32_t>(out.tokens.size());
    const auto next = std::lower_bound(rows.begin(), rows.end(), static_cast<int32_t>(i));
    if (next == rows.end() || *next >= batch.visible_until[i]) continue;
    out.tokens.push_back(batch.tokens[i]);
    out.positions.push_back(batch.positions[i]);
    out.visible_until.push_back(batch.visible_until[i]);
  }
  place[tokens] = static_cast<int32_t>(out.tokens.size());
  for (int32_t& until : out.visible_until) until = place[static_cast<size_t>(until)];
  for (const int32_t row : batch.source_rows) out.source_rows.push_back(place[static_cast<size_t>(row)]);
  return out;
}

// Whether a kept forward has every token of a frame and of those under it, whose rows in it these are; none: it has not.
bool is_kept(const std::vector<int32_t>& rows, const Frame& frame) {
  if (rows.empty()) return false;
  const auto missing = [](int32_t row) { return row < 0; };
  if (std::any_of(rows.begin() + frame.begin, rows.begin() + frame.end, missing)) return false;
  return std::all_of(frame.children.begin(), frame.children.end(),
                     [&](const Frame& child) { return is_kept(rows, child); });
}

}  // namespace

Model::Model(Backend& backend, Arena& arena, ModelConfig config, const Training& training)
    : backend_(backend),
      arena_(arena),
      config_(std::move(config)),
      parameters_(backend, arena, config_, training),
      transformer_(backend, config_, parameters_) {
  initialize_adapters(training.lora_seed);
}

void Model::initialize_adapters(uint64_t seed) {
  uint32_t stream = 0;
  for (const NamedParameter& named : parameters_.named()) {
    ++stream;
    if (!named.adapter || !named.name.ends_with(".lora_A.weight")) continue;
    std::vector<float> data(static_cast<size_t>(named.size()));
    const float bound = 1.0f / std::sqrt(static_cast<float>(named.shape[1]));
    for (size_t i = 0; i < data.size(); ++i) {
      data[i] =
          bound * static_cast<float>(
                      2.0 * sampling_uniform(seed, stream, 0x6c6f7261u, static_cast<uint32_t>(i)) - 1.0);
    }
    parameters_.write(named, parameters_.open_value(*named.parameter), data.data(), 0, named.size());
  }
}

void Model::require_trainable(const char* what) const {
  if (!parameters_.training().trainable) {
    throw Error("UNSUPPORTED", std::string("Expected a trainable model for ") + what +
                                   " but received one that was opened for inference only");
  }
}

void Model::change_weights() {
  if (kept_) kept_->clear();
  ++weights_version_;
  arena_.turn_out();
}

std::vector<Tensor> Model::lend_gradients() {
  give_back_gradients();
  if (accumulates_ || !parameters_.training().trainable) return {};
  parameters_.make_gradients();
  return parameters_.layer_gradients();
}

void Model::give_back_gradients() {
  if (kept_ && kept_->borrows()) kept_->clear();
}

Recorder& Model::recorder() {
  if (!recorder_) recorder_ = backend_.make_recorder();
  return *recorder_;
}

void Model::prepare() {
  if (!stale_) return;
  arena_.reset();
  parameters_.refresh();
  stale_ = false;
}

void Model::load(const std::vector<TensorSource>& sources, const Cancel& cancel) {
  std::unordered_set<std::string> seen;
  for (const TensorSource& source : sources) {
    const NamedParameter& named = parameters_.find(source.name);
    if (source.shape != named.shape) {
      throw Error("INVALID_ARGUMENT", "Expected shape " + shape_text(named.shape) + " for " + source.name +
                                          " but received " + shape_text(source.shape) + " in " + source.path);
    }
    if (!seen.insert(source.name).second) {
      throw Error("INVALID_ARGUMENT", "Expected each parameter once but received " + source.name + " twice");
    }
    if (source.permuted_heads != 0 &&
        (source.permuted_heads < 0 || source.shape[0] != source.permuted_heads * config_.head_size)) {
      throw Error("INVALID_ARGUMENT", "Expected heads of " + std::to_string(config_.head_size) +
                                          " rows for permutedHeads of " + source.name + " but received " +
                                          std::to_string(source.permuted_heads) + " heads in " +
                                          std::to_string(source.shape[0]) + " rows");
    }
  }
  for (const NamedParameter& named : parameters_.named()) {
    if (!named.adapter && !seen.count(named.name)) {
      throw Error("INVALID_ARGUMENT",
                  "Expected a source for every parameter but received none for " + named.name);
    }
  }
  change_weights();
  stale_ = true;
  arena_.reset();
  // The parts of a parameter one after another, and it is packed before the next, so that few values stand beside
  // their packed forms.
  std::vector<std::pair<const NamedParameter*, const TensorSource*>> ordered;
  for (const TensorSource& source : sources) ordered.emplace_back(&parameters_.find(source.name), &source);
  std::sort(ordered.begin(), ordered.end());
  Parameter* open = nullptr;
  for (const auto& [named, source] : ordered) {
    cancel.check("loading");
    if (open != nullptr && open != named->parameter) parameters_.refresh(*open);
    open = named->parameter;
    const Tensor value = parameters_.open_value(*open);
    read_tensor(*source, [&, &named = named](const float* data, int64_t begin, int64_t elements) {
      parameters_.write(*named, value, data, begin, elements);
    });
  }
  prepare();
}

void Model::initialize(uint64_t seed, float standard_deviation) {
  constexpr int64_t kStretch = int64_t{1} << 20;
  change_weights();
  stale_ = true;
  arena_.reset();
  std::vector<float> data;
  uint32_t stream = 0;
  Parameter* open = nullptr;
  for (const NamedParameter& named : parameters_.named()) {
    ++stream;
    if (named.adapter) continue;
    if (open != nullptr && open != named.parameter) parameters_.refresh(*open);
    open = named.parameter;
    const Tensor value = parameters_.open_value(*open);
    const bool norm = !named.decayed() && named.name.ends_with("norm.weight");
    for (int64_t first = 0; first < named.size(); first += kStretch) {
      data.assign(static_cast<size_t>(std::min(kStretch, named.size() - first)), norm ? 1.0f : 0.0f);
      if (named.decayed()) fill_normal(seed, stream, first, standard_deviation, data);
      parameters_.write(named, value, data.data(), first, static_cast<int64_t>(data.size()));
    }
  }
  prepare();
}

std::vector<float> Model::read(const std::string& name, ParameterKind kind) {
  const NamedParameter& named = parameters_.find(name);
  std::vector<float> data(static_cast<size_t>(named.size()), 0.0f);
  if (kind == ParameterKind::merged) {
    prepare();
    parameters_.read_merged(named, data.data());
    return data;
  }
  if (kind != ParameterKind::value) require_trainable("reading gradients and moments");
  if (kind == ParameterKind::gradient) give_back_gradients();
  const Parameter& p = *named.parameter;
  const Tensor whole = kind == ParameterKind::value      ? parameters_.value_of(p)
                       : kind == ParameterKind::gradient ? p.gradient
                       : kind == ParameterKind::adam_m   ? p.adam_m
                                                         : p.adam_v;
  if (whole) parameters_.read(named, whole, data.data());
  return data;
}

void Model::write(const std::string& name, ParameterKind kind, const std::vector<float>& data) {
  const NamedParameter& named = parameters_.find(name);
  if (kind != ParameterKind::value) require_trainable("writing gradients and moments");
  if (static_cast<int64_t>(data.size()) != named.size()) {
    throw Error("INVALID_ARGUMENT", "Expected " + std::to_string(named.size()) + " numbers for " + name +
                                        " but received " + std::to_string(data.size()));
  }
  Parameter& p = *named.parameter;
  if (kind == ParameterKind::merged || (kind != ParameterKind::value && !p.trained)) {
    throw Error("INVALID_ARGUMENT", "Expected a parameter that is trained for name but received " + name);
  }
  if (kind == ParameterKind::gradient) {
    give_back_gradients();
    parameters_.make_gradients();
    accumulates_ = true;
  }
  if (kind == ParameterKind::adam_m || kind == ParameterKind::adam_v) parameters_.make_moments();
  if (kind == ParameterKind::value) {
    change_weights();
    stale_ = true;
  }
  const Tensor& whole = kind == ParameterKind::value      ? parameters_.open_value(p)
                        : kind == ParameterKind::gradient ? p.gradient
                        : kind == ParameterKind::adam_m   ? p.adam_m
                                                          : p.adam_v;
  parameters_.write(named, whole, data.data(), 0, named.size());
}

Tensor Model::upload(const std::vector<int32_t>& data) {
  if (data.empty()) return Tensor();
  const Tensor tensor = arena_.take(DType::i32, {static_cast<int64_t>(data.size())});
  backend_.upload(tensor, data.data(), tensor.bytes());
  return tensor;
}

Tensor Model::upload(const std::vector<float>& data) {
  if (data.empty()) return Tensor();
  const Tensor tensor = arena_.take(DType::f32, {static_cast<int64_t>(data.size())});
  backend_.upload(tensor, data.data(), tensor.bytes());
  return tensor;
}

Forest Model::upload_forest(const std::vector<int32_t>& tokens, const std::vector<int32_t>& positions,
                            const std::vector<int32_t>& visible_until) {
  Forest forest;
  forest.tokens = static_cast<int64_t>(tokens.size());
  forest.ids = upload(tokens);
  forest.positions = upload(positions);
  forest.visible_until = upload(visible_until);
  forest.visible_until_host = visible_until;
  return forest;
}

Tensor Model::hidden_of(const Forest& forest, const Cancel& cancel, const char* work) {
  const Tensor hidden = arena_.take(config_.dtype, {forest.tokens, config_.hidden_size});
  Activations activations = transformer_.make_activations(arena_, forest.tokens, Holds::nothing);
  ForestAttention attention(backend_, forest, transformer_.attention_scale());
  transformer_.forward(forest.ids, forest.positions, attention, activations, cancel, work);
  transformer_.final_norm(activations.output, hidden, Tensor());
  return hidden;
}

template <class Work>
auto Model::within_memory(int64_t tokens, bool trains, int64_t bytes, const Work& work) {
  const bool made_gradients = trains && parameters_.make_gradients();
  try {
    arena_.reset();
    // And what is uploaded.
    const size_t room = static_cast<size_t>(bytes / 32 * 33);
    if (trains) arena_.make_room(room);
    try {
      arena_.reserve(room);
    } catch (const Error& error) {
      if (error.code != "OUT_OF_MEMORY" || arena_.lodged() == 0) throw;
      arena_.turn_out();
      arena_.reserve(room);
    }
    return work();
  } catch (const Error& error) {
    if (error.code != "OUT_OF_MEMORY") throw;
    if (made_gradients) parameters_.drop_gradients();
    throw out_of_memory(error, tokens, trains);
  }
}

// Of the arena, in a pass over so many tokens at once.
int64_t Model::activation_bytes(int64_t tokens, Holds holds, size_t first_layer) const {
  Arena counted;
  counted.take(config_.dtype, {tokens, config_.hidden_size});  // hidden
  transformer_.make_activations(counted, tokens, holds, 0, first_layer);
  if (holds != Holds::nothing) {
    counted.take(config_.dtype, {tokens, config_.hidden_size});  // dhidden
    transformer_.make_backward_buffers(counted, counted.take(DType::f32, {tokens, config_.hidden_size}));
  }
  return static_cast<int64_t>(counted.taken());
}

// The same where the forward is kept and frames go through its layers together, each with its own dx.
int64_t Model::kept_activation_bytes(const std::vector<Frame>& frames) const {
  int64_t tokens = 0;
  for (const Frame& frame : frames) tokens += tokens_of(frame);
  const int64_t at_once = tokens_at_once(frames);
  return 4 * tokens * config_.hidden_size +
         std::max(activation_bytes(at_once, Holds::one_layer),
                  activation_bytes(at_once, Holds::all_layers, kept_->layers()));
}

// Gives the memory of activations back, and says what would have fitted.
Error Model::out_of_memory(const Error& error, int64_t tokens, bool trains) {
  arena_.free();
  backend_.synchronize();
  const int64_t needed = activation_bytes(tokens, trains ? Holds::all_layers : Holds::nothing);
  int64_t beside = 0;  // what does not depend on the tokens
  if (trains && !parameters_.has_gradients()) beside += 4 * parameters_.trained_size();
  const int64_t fit = count_that_fits(tokens, needed, backend_.memory_free() - beside);
  return Error("OUT_OF_MEMORY",
               std::string(error.what()) + ". " + std::to_string(tokens) + " tokens at once need about " +
                   in_words(static_cast<size_t>(needed + beside)) + "; " +
                   (fit > 0 ? "about " + std::to_string(fit) : std::string("none")) + " would fit");
}

std::vector<float> Model::logits(const Batch& batch, const Cancel& cancel) {
  prepare();
  const int64_t tokens = static_cast<int64_t>(batch.tokens.size());
  return within_memory(tokens, false, activation_bytes(tokens, Holds::nothing),
                       [&] { return compute_logits(batch, cancel); });
}

Scores Model::score(const Batch& batch, const Cancel& cancel) {
  prepare();
  const int64_t tokens = static_cast<int64_t>(batch.tokens.size());
  return within_memory(tokens, false, activation_bytes(tokens, Holds::nothing),
                       [&] { return compute_scores(batch, cancel); });
}

LossResult Model::forward_backward(const Batch& given, const BatchLoss& loss, int64_t max_tokens,
                                   const Cancel& cancel) {
  require_trainable("forwardBackward");
  prepare();
  const Batch batch = without_idle_tokens(given);
  std::vector<bool> joined;
  if (loss.options.kind == LossKind::gspo) joined = within_sequences(batch, loss.sequences);
  std::vector<int32_t> rows;
  if (kept_ && kept_->used() > 0) rows = kept_->find(batch.tokens, batch.visible_until);
  const std::vector<Frame> frames = make_frames(batch.visible_until, max_tokens, joined);
  std::vector<Frame> kept, others;
  for (const Frame& frame : frames) (is_kept(rows, frame) ? kept : others).push_back(frame);
  // Else the gradients are free for these.
  if (kept.empty()) give_back_gradients();
  const int64_t bytes =
      std::max(kept.empty() ? 0 : kept_activation_bytes(kept),
               others.empty() ? 0 : activation_bytes(tokens_at_once(others), Holds::all_layers));
  return within_memory(tokens_at_once(frames), true, bytes, [&] {
    GradientPass pass(*this, batch, loss, cancel);
    try {
      if (!kept.empty()) pass.run_kept(kept, rows);
      pass.run(others);
    } catch (...) {
      // What was added already cannot be taken back.
      if (pass.begun()) zero_gradients();
      throw;
    }
    accumulates_ = true;
    give_back_gradients();
    LossResult result = pass.result();
    if (!result.finite) zero_gradients();
    return result;
  });
}

std::vector<float> Model::compute_logits(const Batch& batch, const Cancel& cancel) {
  const Forest forest = upload_forest(batch.tokens, batch.positions, batch.visible_until);
  const Tensor hidden = hidden_of(forest, cancel, "logits");
  const Tensor rows = upload(batch.source_rows);
  const Tensor gathered = arena_.take(config_.dtype, {rows.size(), config_.hidden_size});
  backend_.gather_rows(hidden, rows, gathered);
  const Tensor logits = arena_.take(DType::f32, {rows.size(), config_.vocab_size});
  transformer_.head(gathered, logits);
  std::vector<float> out(static_cast<size_t>(logits.size()));
  backend_.download(out.data(), logits, logits.bytes());
  return out;
}

Scores Model::compute_scores(const Batch& batch, const Cancel& cancel) {
  const Forest forest = upload_forest(batch.tokens, batch.positions, batch.visible_until);
  const int64_t rows = static_cast<int64_t>(batch.source_rows.size());
  const Tensor logprobs = arena_.take(DType::f32, {rows}), entropies = arena_.take(DType::f32, {rows});
  const Tensor hidden = hidden_of(forest, cancel, "scoring");
  cancel.check("scoring");
  backend_.head_logprobs(hidden, *parameters_.head().packed, batch.source_rows, batch.targets, logprobs,
                         entropies);
  Scores scores;
  scores.logprobs.resize(batch.source_rows.size());
  scores.entropies.resize(batch.source_rows.size());
  backend_.download(scores.logprobs.data(), logprobs, logprobs.bytes());
  backend_.download(scores.entropies.data(), entropies, entropies.bytes());
  return scores;
}

OptimizerResult Model::optim_step(const OptimizerOptions& options, int64_t step) {
  require_trainable("optimStep");
  prepare();
  give_back_gradients();
  parameters_.make_gradients();
  try {
    parameters_.make_moments();
  } catch (const Error& error) {
    if (error.code != "OUT_OF_MEMORY") throw;
    const size_t bytes = 8 * static_cast<size_t>(parameters_.trained_size());
    throw Error(error.code, std::string(error.what()) + ". AdamW's moments take " + in_words(bytes));
  }
  std::vector<Tensor> gradients;
  gradients.reserve(parameters_.trained().size());
  for (const Parameter* parameter : parameters_.trained()) gradients.push_back(parameter->gradient);
  OptimizerResult result;
  result.gradient_norm = std::sqrt(backend_.sum_of_squares(gradients));
  result.applied = std::isfinite(result.gradient_norm);
  if (result.applied) {
    AdamWOptions adamw;
    adamw.learning_rate = options.learning_rate;
    adamw.beta1 = options.beta1;
    adamw.beta2 = options.beta2;
    adamw.epsilon = options.epsilon;
    adamw.step = step;
    if (options.max_gradient_norm > 0.0f) {
      // As torch.nn.utils.clip_grad_norm_, whose denominator has this 1e-6.
      adamw.gradient_scale =
          static_cast<float>(std::min(1.0, options.max_gradient_norm / (result.gradient_norm + 1e-6)));
    }
    change_weights();
    arena_.reset();
    parameters_.update(adamw, options.weight_decay);
  }
  zero_gradients();
  return result;
}

void Model::zero_gradients() {
  give_back_gradients();
  parameters_.zero_gradients();
  accumulates_ = false;
}

}  // namespace merf
