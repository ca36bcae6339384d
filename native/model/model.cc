#include "model/model.h"

#include <algorithm>
#include <cmath>
#include <unordered_set>

#include "backend/in_words.h"
#include "backend/philox.h"
#include "model/gradient_pass.h"
#include "model/score_pass.h"

namespace merf {
namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// Element `index` of the stream of standard normal numbers that belongs to (seed, stream): Box-Muller on
// Philox.
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

// Whether the activation cache has every token of a micro-batch and of those under it. `rows` has each
// token's row in the cache, or is empty where nothing is cached.
bool is_cached(const std::vector<int32_t>& rows, const MicroBatch& micro_batch) {
  if (rows.empty()) return false;
  const auto missing = [](int32_t row) { return row < 0; };
  if (std::any_of(rows.begin() + micro_batch.begin, rows.begin() + micro_batch.end, missing)) return false;
  return std::all_of(micro_batch.children.begin(), micro_batch.children.end(),
                     [&](const MicroBatch& child) { return is_cached(rows, child); });
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
  if (activation_cache_) activation_cache_->clear();
  ++weights_version_;
  arena_.evict_resident();
}

std::vector<Tensor> Model::borrow_gradients() {
  reclaim_gradients();
  if (accumulates_ || !parameters_.training().trainable) return {};
  parameters_.make_gradients();
  return parameters_.layer_gradients();
}

void Model::reclaim_gradients() {
  if (activation_cache_ && activation_cache_->borrows()) activation_cache_->clear();
}

Recorder& Model::recorder() {
  if (!recorder_) recorder_ = backend_.make_recorder();
  return *recorder_;
}

void Model::prepare(const Cancel* cancel) {
  if (!stale_) return;
  arena_.reset();
  parameters_.refresh(cancel);
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
  // The parts of a parameter one after another, and it is packed before the next, so that few values stand
  // beside their packed forms.
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
  prepare(&cancel);
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
  if (kind == ParameterKind::gradient) reclaim_gradients();
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
    reclaim_gradients();
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

Forest Model::upload_forest(const Batch& batch) {
  Forest forest = upload_forest(batch.tokens, batch.positions, batch.visible_until);
  forest.ancestors = static_cast<int64_t>(batch.visible_until.size()) - forest.tokens;
  return forest;
}

void Model::download_scores(const Tensor& logprobs, const Tensor& entropies, const std::vector<int32_t>& rows,
                            Scores& scores) {
  std::vector<float> values(rows.size());
  const auto scatter = [&](const Tensor& from, std::vector<float>& to) {
    backend_.download(values.data(), from, from.bytes());
    for (size_t i = 0; i < rows.size(); ++i) to[static_cast<size_t>(rows[i])] = values[i];
  };
  scatter(logprobs, scores.logprobs);
  scatter(entropies, scores.entropies);
}

int64_t Model::tokens_that_fit(bool trains) const {
  const ModelConfig& c = config_;
  const int64_t size = static_cast<int64_t>(size_of(c.dtype)), most = backend_.info().memory_bytes / 5;
  if (!trains) {
    const int64_t elements = 6 * c.hidden_size + 2 * c.qkv_size() + 4 * c.mlp_size;
    return std::clamp<int64_t>(most / (c.layers * elements * size), 512, 32768);
  }
  int64_t parameters = 0;
  for (const NamedParameter& named : parameters_.named()) parameters += named.adapter ? 0 : named.size();
  const int64_t state = parameters_.training().lora_rank == 0 ? 4 * parameters : parameters;
  const int64_t elements = c.attention_size() + c.qkv_size() + 2 * c.mlp_size;
  const int64_t bytes_per_token = c.layers * (8 * c.hidden_size + size * elements);
  return std::max<int64_t>(256, std::min(std::max(int64_t{1} << 29, state), most) / bytes_per_token);
}

Tensor Model::hidden_of(const Forest& forest, const Cancel& cancel, const char* work) {
  const Tensor hidden = arena_.take(config_.dtype, {forest.tokens, config_.hidden_size});
  Activations activations = transformer_.make_activations(arena_, forest.tokens, SavedLayers::none);
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
    // The rest is for what is uploaded.
    const size_t room = static_cast<size_t>(bytes / 32 * 33);
    if (trains) arena_.make_room(room);
    try {
      arena_.reserve(room);
    } catch (const Error& error) {
      if (error.code != "OUT_OF_MEMORY" || arena_.resident_bytes() == 0) throw;
      arena_.evict_resident();
      arena_.reserve(room);
    }
    return work();
  } catch (const Error& error) {
    if (error.code != "OUT_OF_MEMORY") throw;
    if (made_gradients) parameters_.drop_gradients();
    throw out_of_memory(error, tokens, trains);
  }
}

// Bytes of the arena that a pass over so many tokens at once takes.
int64_t Model::activation_bytes(int64_t tokens, SavedLayers saved, size_t first_layer) const {
  Arena counted;
  counted.take(config_.dtype, {tokens, config_.hidden_size});  // hidden
  transformer_.make_activations(counted, tokens, saved, 0, first_layer);
  if (saved != SavedLayers::none) {
    counted.take(config_.dtype, {tokens, config_.hidden_size});  // dhidden
    transformer_.make_backward_buffers(counted, counted.take(DType::f32, {tokens, config_.hidden_size}));
  }
  return static_cast<int64_t>(counted.taken());
}

// Bytes of the arena that a pass over cached micro-batches takes. They go through the layers together, each
// with its own dx.
int64_t Model::cached_activation_bytes(const std::vector<MicroBatch>& micro_batches) const {
  int64_t tokens = 0;
  for (const MicroBatch& micro_batch : micro_batches) tokens += tokens_of(micro_batch);
  const int64_t at_once = tokens_at_once(micro_batches);
  return 4 * tokens * config_.hidden_size +
         std::max(activation_bytes(at_once, SavedLayers::one),
                  activation_bytes(at_once, SavedLayers::all, activation_cache_->layers()));
}

// Gives the memory of activations back, and says what would have fitted.
Error Model::out_of_memory(const Error& error, int64_t tokens, bool trains) {
  arena_.free();
  backend_.synchronize();
  const int64_t needed = activation_bytes(tokens, trains ? SavedLayers::all : SavedLayers::none);
  int64_t beside = 0;  // what does not depend on the tokens
  if (trains && !parameters_.has_gradients()) beside += 4 * parameters_.trained_size();
  const int64_t fit = count_that_fits(tokens, needed, backend_.memory_free() - beside);
  return Error("OUT_OF_MEMORY",
               std::string(error.what()) + ". " + std::to_string(tokens) + " tokens at once need about " +
                   in_words(static_cast<size_t>(needed + beside)) + "; " +
                   (fit > 0 ? "about " + std::to_string(fit) : std::string("none")) + " would fit");
}

std::vector<float> Model::logits(const Batch& batch, const Cancel& cancel) {
  prepare(&cancel);
  const int64_t tokens = static_cast<int64_t>(batch.tokens.size());
  return within_memory(tokens, false, activation_bytes(tokens, SavedLayers::none),
                       [&] { return compute_logits(batch, cancel); });
}

Scores Model::score(const Batch& given, int64_t max_tokens, const Cancel& cancel, float temperature) {
  prepare(&cancel);
  const Batch batch = without_idle_tokens(given);
  const std::vector<MicroBatch> micro_batches = make_micro_batches(batch.visible_until, max_tokens, {});
  return within_memory(tokens_at_once(micro_batches), false, ScorePass::bytes(*this, micro_batches), [&] {
    ScorePass pass(*this, batch, temperature, cancel);
    pass.run(micro_batches);
    Scores scores = pass.result();
    const auto none = std::find_if(scores.logprobs.begin(), scores.logprobs.end(),
                                   [](float logprob) { return std::isnan(logprob); });
    if (none != scores.logprobs.end()) {
      const auto row = none - scores.logprobs.begin();
      throw Error("NON_FINITE", "Expected finite logits but received NaN or Infinity for scored token " +
                                    std::to_string(row) + ", whose id is " +
                                    std::to_string(batch.targets[static_cast<size_t>(row)]) +
                                    ": the model's weights or its activations have overflowed");
    }
    return scores;
  });
}

LossResult Model::forward_backward(const Batch& batch, const BatchLoss& loss, int64_t max_tokens,
                                   const Cancel& cancel) {
  require_trainable("forwardBackward");
  try {
    LossResult result = compute_gradients(batch, loss, max_tokens, cancel);
    if (!result.finite) zero_gradients();
    return result;
  } catch (...) {
    // What was added already cannot be told from what earlier calls added. Gradients that are 0 stay, with
    // what the activation cache has in their memory.
    if (accumulates_) discard_gradients();
    throw;
  }
}

LossResult Model::compute_gradients(const Batch& given, const BatchLoss& loss, int64_t max_tokens,
                                    const Cancel& cancel) {
  prepare(&cancel);
  const Batch batch = without_idle_tokens(given);
  std::vector<bool> joined;
  if (loss.options.kind == LossKind::gspo) joined = within_sequences(batch, loss.sequences);
  std::vector<int32_t> rows;
  if (activation_cache_ && activation_cache_->used() > 0) {
    rows = activation_cache_->find(batch.tokens, batch.visible_until);
  }
  const std::vector<MicroBatch> micro_batches = make_micro_batches(batch.visible_until, max_tokens, joined);
  std::vector<MicroBatch> cached, others;
  for (const MicroBatch& micro_batch : micro_batches) {
    (is_cached(rows, micro_batch) ? cached : others).push_back(micro_batch);
  }
  // Where the cache serves nothing, the gradients' memory is free for these.
  if (cached.empty()) reclaim_gradients();
  const int64_t bytes =
      std::max(cached.empty() ? 0 : cached_activation_bytes(cached),
               others.empty() ? 0 : activation_bytes(tokens_at_once(others), SavedLayers::all));
  return within_memory(tokens_at_once(micro_batches), true, bytes, [&] {
    GradientPass pass(*this, batch, loss, cancel);
    if (!cached.empty()) pass.run_cached(cached, rows);
    pass.run(others);
    reclaim_gradients();
    return pass.result();
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

OptimizerResult Model::optim_step(const OptimizerOptions& options, int64_t step) {
  require_trainable("optimStep");
  prepare();
  reclaim_gradients();
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
      // torch.nn.utils.clip_grad_norm_ has this 1e-6 in its denominator, too.
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
  reclaim_gradients();
  parameters_.zero_gradients();
  accumulates_ = false;
}

void Model::discard_gradients() noexcept {
  try {
    zero_gradients();
  } catch (const Error&) {
    // The device has failed; whoever uses it next will be told.
  }
}

}  // namespace merf
