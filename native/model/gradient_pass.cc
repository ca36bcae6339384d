#include "model/gradient_pass.h"

#include <cmath>

namespace merf {
namespace {

constexpr const char* kWork = "forwardBackward";

// The sequences with numbers that rise from 0.
std::vector<int32_t> renumbered(std::vector<int32_t> sequences) {
  int32_t next = -1, last = -1;
  for (int32_t& sequence : sequences) {
    if (sequence != last) ++next;
    last = sequence;
    sequence = next;
  }
  return sequences;
}

}  // namespace

// What stays of a micro-batch while its children are trained on.
struct GradientPass::Ancestors {
  int64_t tokens;  // of this one and of those above it
  const Activations& activations;
  // [tokens, (Hq + 2 Hk) D] f32 by layer: gradients of keys and values; the queries' are 0.
  std::vector<Tensor> dqkv;
};

// What belongs to a micro-batch beside its layers.
struct GradientPass::OpenMicroBatch {
  const MicroBatch* micro_batch;
  std::vector<int32_t> rows;     // of the batch
  std::vector<int32_t> sources;  // the tokens that the rows start from, counted from the micro-batch's first
  int64_t first_wanted;
  Forest forest;
  Tensor dx;  // [tokens, H] f32
  // Where the activation cache is used: [tokens] i32, its rows, and the micro-batches under this one.
  Tensor cached_rows;
  std::vector<OpenMicroBatch> children;
};

GradientPass::GradientPass(Model& model, const Batch& batch, const BatchLoss& loss, const Cancel& cancel)
    : model_(model),
      backend_(model.backend()),
      arena_(model.arena()),
      transformer_(model.transformer()),
      batch_(batch),
      loss_(loss),
      cancel_(cancel),
      reader_(batch) {
  result_.scores.logprobs.resize(batch.source_rows.size());
  result_.scores.entropies.resize(batch.source_rows.size());
}

LossResult GradientPass::result() {
  result_.statistics =
      result_.finite ? loss_statistics(loss_, result_.scores) : unknown_statistics(loss_.weights.size());
  return std::move(result_);
}

void GradientPass::run_all(const std::vector<MicroBatch>& micro_batches, const Ancestors* above) {
  for (const MicroBatch& micro_batch : micro_batches) {
    if (!result_.finite || !reader_.has_rows(micro_batch)) continue;
    const ArenaScope scope(arena_);
    const OpenMicroBatch opened = open(micro_batch, above ? above->tokens : 0);
    run_layers(opened, above, 0, [&](const Ancestors& own) { run_all(micro_batch.children, &own); });
    if (result_.finite) transformer_.backward_embedding(opened.forest, opened.dx);
  }
}

GradientPass::OpenMicroBatch GradientPass::open(const MicroBatch& micro_batch, int64_t ancestors) {
  const int64_t tokens = micro_batch.end - micro_batch.begin;
  OpenMicroBatch opened;
  opened.micro_batch = &micro_batch;
  opened.rows = reader_.rows_of(micro_batch);
  opened.sources = reader_.sources_of(opened.rows, micro_batch);
  opened.first_wanted = first_of(opened.sources, tokens);
  opened.forest = model_.upload_forest(reader_.tokens_behind(ancestors, micro_batch));
  opened.dx = arena_.take(DType::f32, {tokens, model_.config().hidden_size});
  return opened;
}

template <class Children>
void GradientPass::run_layers(const OpenMicroBatch& micro_batch, const Ancestors* above, size_t first_layer,
                              const Children& run_children) {
  cancel_.check(kWork);
  const ArenaScope scope(arena_);
  const ModelConfig& config = model_.config();
  const Forest& forest = micro_batch.forest;
  const int64_t tokens = forest.tokens, ancestors = forest.ancestors;
  const Tensor hidden = arena_.take(config.dtype, {tokens, config.hidden_size});
  Activations activations =
      transformer_.make_activations(arena_, tokens, SavedLayers::all, ancestors, first_layer);
  activations.first_wanted = micro_batch.first_wanted;
  for (size_t layer = first_layer; layer < activations.layers.size(); ++layer) {
    take_ancestors(layer, activations, above ? &above->activations : nullptr);
  }
  if (micro_batch.cached_rows)
    model_.activation_cache()->restore_output(micro_batch.cached_rows, activations.input_of(first_layer));
  ForestAttention attention(backend_, forest, transformer_.attention_scale());
  transformer_.forward(forest.ids, forest.positions, attention, activations, cancel_, kWork, first_layer);
  const auto wanted = [&](const Tensor& x) { return x.rows(activations.first_wanted, tokens); };
  transformer_.final_norm(wanted(activations.output), wanted(hidden), wanted(activations.output_rstd));

  Ancestors own{ancestors + tokens, activations, std::vector<Tensor>(activations.layers.size())};
  if (!micro_batch.micro_batch->children.empty()) {
    for (size_t layer = first_layer; layer < activations.layers.size(); ++layer) {
      own.dqkv[layer] = take_dqkv(own.tokens);
    }
    run_children(own);
    if (!result_.finite) return;
  }

  cancel_.check(kWork);
  const Tensor dhidden = arena_.take(config.dtype, {tokens, config.hidden_size});
  if (!add_loss(micro_batch, hidden, dhidden)) return;
  const BackwardBuffers buffers = transformer_.make_backward_buffers(arena_, micro_batch.dx, ancestors);
  transformer_.backward_final_norm(dhidden, activations.output, activations.output_rstd,
                                   activations.first_wanted, micro_batch.dx);
  for (size_t layer = activations.layers.size(); layer-- > first_layer;) {
    transformer_.backward_layer(layer, forest, activations, buffers, own.dqkv[layer],
                                above ? above->dqkv[layer] : Tensor(), cancel_);
  }
}

// Takes room for the gradients of keys and values that come from tokens behind these, filled with 0.
Tensor GradientPass::take_dqkv(int64_t tokens) {
  const Tensor dqkv = arena_.take(DType::f32, {tokens, model_.config().qkv_size()});
  backend_.zero(dqkv);
  return dqkv;
}

// The outputs of tokens that none of these queries are become 0, as attention_backward wants them.
void GradientPass::take_ancestors(size_t layer, const Activations& activations, const Activations* above) {
  const Activations::Layer& own = activations.layers[layer];
  const int64_t ancestors = activations.ancestors, unseen = ancestors + activations.first_row(layer);
  if (above != nullptr) backend_.copy(own.qkv.rows(0, ancestors), above->layers[layer].qkv);
  if (unseen > 0) backend_.zero(own.attention_output.rows(0, unseen));
}

std::vector<GradientPass::OpenMicroBatch> GradientPass::open_cached(
    const std::vector<MicroBatch>& micro_batches, const std::vector<int32_t>& rows, int64_t ancestors) {
  std::vector<OpenMicroBatch> all;
  for (const MicroBatch& micro_batch : micro_batches) {
    if (!reader_.has_rows(micro_batch)) continue;
    OpenMicroBatch& opened = all.emplace_back(open(micro_batch, ancestors));
    opened.cached_rows =
        model_.upload(std::vector<int32_t>(rows.begin() + micro_batch.begin, rows.begin() + micro_batch.end));
    opened.children = open_cached(micro_batch.children, rows, ancestors + opened.forest.tokens);
  }
  return all;
}

void GradientPass::run_cached(const std::vector<MicroBatch>& micro_batches,
                              const std::vector<int32_t>& rows) {
  const ArenaScope scope(arena_);
  const std::vector<OpenMicroBatch> all = open_cached(micro_batches, rows, 0);
  run_upper_layers(all, nullptr);
  if (!result_.finite) return;
  for (size_t layer = model_.activation_cache()->layers(); layer-- > 0;) {
    for (const OpenMicroBatch& micro_batch : all) run_cached_layer(layer, micro_batch, nullptr, Tensor());
    model_.activation_cache()->release(layer);
  }
  backward_embeddings(all);
}

void GradientPass::run_upper_layers(const std::vector<OpenMicroBatch>& micro_batches,
                                    const Ancestors* above) {
  for (const OpenMicroBatch& micro_batch : micro_batches) {
    if (!result_.finite) return;
    run_layers(micro_batch, above, model_.activation_cache()->layers(),
               [&](const Ancestors& own) { run_upper_layers(micro_batch.children, &own); });
  }
}

void GradientPass::run_cached_layer(size_t layer, const OpenMicroBatch& micro_batch, const Activations* above,
                                    const Tensor& above_dqkv) {
  const ArenaScope scope(arena_);
  const Forest& forest = micro_batch.forest;
  Activations activations =
      transformer_.make_activations(arena_, forest.tokens, SavedLayers::one, forest.ancestors);
  activations.first_wanted = micro_batch.first_wanted;
  take_ancestors(layer, activations, above);
  model_.activation_cache()->restore(layer, micro_batch.cached_rows, activations);
  ForestAttention attention(backend_, forest, transformer_.attention_scale());
  transformer_.complete(layer, attention, activations);
  Tensor dqkv;
  if (!micro_batch.children.empty()) {
    dqkv = take_dqkv(forest.ancestors + forest.tokens);
    for (const OpenMicroBatch& child : micro_batch.children)
      run_cached_layer(layer, child, &activations, dqkv);
  }
  const BackwardBuffers buffers =
      transformer_.make_backward_buffers(arena_, micro_batch.dx, forest.ancestors);
  transformer_.backward_layer(layer, forest, activations, buffers, dqkv, above_dqkv, cancel_);
}

void GradientPass::backward_embeddings(const std::vector<OpenMicroBatch>& micro_batches) {
  for (const OpenMicroBatch& micro_batch : micro_batches) {
    backward_embeddings(micro_batch.children);
    transformer_.backward_embedding(micro_batch.forest, micro_batch.dx);
  }
}

bool GradientPass::add_loss(const OpenMicroBatch& micro_batch, const Tensor& hidden, const Tensor& dhidden) {
  model_.begin_accumulating();
  const std::vector<int32_t>& rows = micro_batch.rows;
  if (rows.empty()) {
    backend_.zero(dhidden);
    return true;
  }
  const ArenaScope scope(arena_);
  const int64_t count = static_cast<int64_t>(rows.size());
  const bool by_sequence = loss_.options.kind == LossKind::gspo;
  const bool penalized = loss_.options.kl_coefficient > 0.0f;
  const LossRows loss_rows{model_.upload(picked(loss_.weights, rows)),
                           model_.upload(picked(loss_.advantages, rows)),
                           model_.upload(picked(loss_.old_logprobs, rows)),
                           penalized ? model_.upload(picked(loss_.reference_logprobs, rows)) : Tensor(),
                           by_sequence ? model_.upload(renumbered(picked(loss_.sequences, rows))) : Tensor(),
                           penalized ? model_.upload(picked(loss_.kl_weights, rows)) : Tensor(),
                           model_.upload(picked(loss_.entropy_weights, rows))};
  const Tensor logprobs = arena_.take(DType::f32, {count}), entropies = arena_.take(DType::f32, {count});
  Parameter& head = model_.parameters().head();
  const double loss =
      backend_.head_loss(hidden, *head.packed, micro_batch.sources, picked(batch_.targets, rows), loss_rows,
                         loss_.options, logprobs, entropies, dhidden, head.gradient);
  result_.loss += loss;
  result_.finite = std::isfinite(loss);
  model_.download_scores(logprobs, entropies, rows, result_.scores);
  return result_.finite;
}

}  // namespace merf
