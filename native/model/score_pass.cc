#include "model/score_pass.h"

#include <algorithm>

namespace merf {
namespace {

constexpr const char* kWork = "scoring";

// Attention within a forest and to its ancestors, whose keys and values it first puts beside the forest's
// own: layers share their buffers, so that this cannot be done before the forward.
class AttentionBehind final : public AttentionStep {
 public:
  AttentionBehind(Backend& backend, const Forest& forest, float scale, const std::vector<Tensor>* ancestors,
                  const Activations& activations)
      : backend_(backend),
        within_(backend, forest, scale),
        ancestors_(ancestors),
        activations_(activations) {}

  void attend(int64_t layer, const HeadsView& q, const HeadsView& k, const HeadsView& v, const HeadsView& out,
              const Tensor& lse, int64_t first) override {
    const size_t i = static_cast<size_t>(layer);
    if (ancestors_ != nullptr) {
      backend_.copy(activations_.layers[i].qkv.rows(0, activations_.ancestors), (*ancestors_)[i]);
    }
    within_.attend(layer, q, k, v, out, lse, first);
  }

 private:
  Backend& backend_;
  ForestAttention within_;
  const std::vector<Tensor>* ancestors_;  // by layer; null where there are none
  const Activations& activations_;
};

}  // namespace

ScorePass::ScorePass(Model& model, const Batch& batch, float temperature, const Cancel& cancel)
    : model_(model),
      backend_(model.backend()),
      arena_(model.arena()),
      transformer_(model.transformer()),
      batch_(batch),
      temperature_(temperature),
      cancel_(cancel),
      reader_(batch) {
  scores_.logprobs.resize(batch.source_rows.size());
  scores_.entropies.resize(batch.source_rows.size());
}

void ScorePass::run_all(const std::vector<MicroBatch>& micro_batches, const Ancestors* above) {
  for (const MicroBatch& micro_batch : micro_batches) {
    if (!reader_.has_rows(micro_batch)) continue;
    const ArenaScope scope(arena_);
    Ancestors own;
    if (!micro_batch.children.empty()) {
      const ModelConfig& config = model_.config();
      own.tokens = (above ? above->tokens : 0) + micro_batch.end - micro_batch.begin;
      for (int64_t i = 0; i < config.layers; ++i) {
        own.qkv.push_back(arena_.take(config.dtype, {own.tokens, config.qkv_size()}));
      }
    }
    run_one(micro_batch, above, own);
    run_all(micro_batch.children, &own);
  }
}

void ScorePass::run_one(const MicroBatch& micro_batch, const Ancestors* above, const Ancestors& own) {
  cancel_.check(kWork);
  const ArenaScope scope(arena_);
  const ModelConfig& config = model_.config();
  const std::vector<int32_t> rows = reader_.rows_of(micro_batch);
  const std::vector<int32_t> sources = reader_.sources_of(rows, micro_batch);
  const int64_t tokens = micro_batch.end - micro_batch.begin, ancestors = above ? above->tokens : 0;
  const Forest forest = model_.upload_forest(reader_.tokens_behind(ancestors, micro_batch));
  const Tensor hidden = arena_.take(config.dtype, {tokens, config.hidden_size});
  Activations activations = transformer_.make_activations(arena_, tokens, SavedLayers::none, ancestors);
  activations.first_wanted = first_of(sources, tokens);
  for (size_t i = 0; i < own.qkv.size(); ++i) activations.layers[i].qkv = own.qkv[i];
  AttentionBehind attention(backend_, forest, transformer_.attention_scale(), above ? &above->qkv : nullptr,
                            activations);
  transformer_.forward(forest.ids, forest.positions, attention, activations, cancel_, kWork);
  if (rows.empty()) return;
  cancel_.check(kWork);
  const auto wanted = [&](const Tensor& x) { return x.rows(activations.first_wanted, tokens); };
  transformer_.final_norm(wanted(activations.output), wanted(hidden), Tensor());
  const int64_t count = static_cast<int64_t>(rows.size());
  const Tensor logprobs = arena_.take(DType::f32, {count}), entropies = arena_.take(DType::f32, {count});
  backend_.head_logprobs(hidden, *model_.parameters().head().packed, sources, picked(batch_.targets, rows),
                         logprobs, entropies, temperature_);
  model_.download_scores(logprobs, entropies, rows, scores_);
}

int64_t ScorePass::bytes(const Model& model, const std::vector<MicroBatch>& micro_batches,
                         int64_t ancestors) {
  const ModelConfig& config = model.config();
  int64_t most = 0;
  for (const MicroBatch& micro_batch : micro_batches) {
    const int64_t tokens = micro_batch.end - micro_batch.begin, all = ancestors + tokens;
    Arena counted;
    if (!micro_batch.children.empty()) {
      for (int64_t i = 0; i < config.layers; ++i) counted.take(config.dtype, {all, config.qkv_size()});
    }
    const int64_t kept = static_cast<int64_t>(counted.taken());
    counted.take(config.dtype, {tokens, config.hidden_size});
    model.transformer().make_activations(counted, tokens, SavedLayers::none, ancestors);
    most = std::max(
        {most, static_cast<int64_t>(counted.taken()), kept + bytes(model, micro_batch.children, all)});
  }
  return most;
}

}  // namespace merf
