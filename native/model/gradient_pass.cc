#include "model/gradient_pass.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace merf {
namespace {

constexpr const char* kWork = "forwardBackward";

template <typename T>
std::vector<T> picked(const std::vector<T>& from, const std::vector<int32_t>& rows) {
  std::vector<T> out;
  if (from.empty()) return out;
  out.reserve(rows.size());
  for (const int32_t row : rows) out.push_back(from[static_cast<size_t>(row)]);
  return out;
}

// The same with numbers that rise from 0.
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

// What stays of a frame while its children are trained on.
struct GradientPass::Held {
  int64_t tokens;  // with those of the frames above it
  const Activations& activations;
  std::vector<Tensor>
      dqkv;  // by layer, [tokens, (Hq + 2 Hk) D] f32: gradients of keys and values; queries' are 0
};

// What a frame has beside its layers.
struct GradientPass::OpenFrame {
  const Frame* frame;
  std::vector<int32_t> loss_rows;
  int64_t first_wanted;
  Forest forest;
  Tensor dx;  // [tokens, H] f32
  // Where Model::kept() is used: [tokens] i32, its rows, and the frames under this.
  Tensor kept_rows;
  std::vector<OpenFrame> children;
};

GradientPass::GradientPass(Model& model, const Batch& batch, const BatchLoss& loss, const Cancel& cancel)
    : model_(model),
      backend_(model.backend()),
      arena_(model.arena()),
      transformer_(model.transformer()),
      batch_(batch),
      loss_(loss),
      cancel_(cancel),
      by_source_(batch.source_rows.size()) {
  std::iota(by_source_.begin(), by_source_.end(), 0);
  std::stable_sort(by_source_.begin(), by_source_.end(), [&](int32_t a, int32_t b) {
    return batch.source_rows[static_cast<size_t>(a)] < batch.source_rows[static_cast<size_t>(b)];
  });
  result_.scores.logprobs.resize(batch.source_rows.size());
  result_.scores.entropies.resize(batch.source_rows.size());
}

void GradientPass::run_all(const std::vector<Frame>& frames, const Held* above) {
  for (const Frame& frame : frames) {
    if (!result_.finite || !has_rows(frame)) continue;
    const ArenaScope scope(arena_);
    const OpenFrame opened = open(frame, above ? above->tokens : 0);
    run_layers(opened, above, 0, [&](const Held& held) { run_all(frame.children, &held); });
    if (result_.finite) transformer_.backward_embedding(opened.forest, opened.dx);
  }
}

std::vector<int32_t> GradientPass::rows_of(int64_t begin, int64_t end) const {
  const auto before = [&](int32_t row, int64_t token) {
    return batch_.source_rows[static_cast<size_t>(row)] < token;
  };
  std::vector<int32_t> rows(std::lower_bound(by_source_.begin(), by_source_.end(), begin, before),
                            std::lower_bound(by_source_.begin(), by_source_.end(), end, before));
  std::sort(rows.begin(), rows.end());
  return rows;
}

// Of the tokens of a frame the first that has a loss row; the last token where none has.
int64_t GradientPass::first_source(const std::vector<int32_t>& rows, const Frame& frame) const {
  int64_t first = frame.end - 1;
  for (const int32_t row : rows) {
    first = std::min<int64_t>(first, batch_.source_rows[static_cast<size_t>(row)]);
  }
  return first - frame.begin;
}

bool GradientPass::has_rows(const Frame& frame) const {
  return !rows_of(frame.begin, frame.end).empty() ||
         std::any_of(frame.children.begin(), frame.children.end(),
                     [&](const Frame& child) { return has_rows(child); });
}

// Tokens [begin, end) behind `ancestors` that all of them see.
Forest GradientPass::upload_forest(int64_t begin, int64_t end, int64_t ancestors) {
  const auto part = [&](const std::vector<int32_t>& all) {
    return std::vector<int32_t>(all.begin() + begin, all.begin() + end);
  };
  const int64_t tokens = ancestors + end - begin;
  std::vector<int32_t> visible_until(static_cast<size_t>(tokens), static_cast<int32_t>(tokens));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t until = std::min<int64_t>(end, batch_.visible_until[static_cast<size_t>(i)]);
    visible_until[static_cast<size_t>(ancestors + i - begin)] =
        static_cast<int32_t>(ancestors + until - begin);
  }
  Forest forest = model_.upload_forest(part(batch_.tokens), part(batch_.positions), visible_until);
  forest.ancestors = ancestors;
  return forest;
}

GradientPass::OpenFrame GradientPass::open(const Frame& frame, int64_t ancestors) {
  std::vector<int32_t> rows = rows_of(frame.begin, frame.end);
  const int64_t first_wanted = first_source(rows, frame);
  return {&frame,
          std::move(rows),
          first_wanted,
          upload_forest(frame.begin, frame.end, ancestors),
          arena_.take(DType::f32, {frame.end - frame.begin, model_.config().hidden_size}),
          Tensor(),
          {}};
}

template <class Children>
void GradientPass::run_layers(const OpenFrame& frame, const Held* above, size_t first_layer,
                              const Children& run_children) {
  cancel_.check(kWork);
  const ArenaScope scope(arena_);
  const ModelConfig& config = model_.config();
  const Forest& forest = frame.forest;
  const int64_t tokens = forest.tokens, ancestors = forest.ancestors;
  const Tensor hidden = arena_.take(config.dtype, {tokens, config.hidden_size});
  Activations activations =
      transformer_.make_activations(arena_, tokens, Holds::all_layers, ancestors, first_layer);
  activations.first_wanted = frame.first_wanted;
  for (size_t layer = first_layer; layer < activations.layers.size(); ++layer) {
    take_ancestors(layer, activations, above ? &above->activations : nullptr);
  }
  if (frame.kept_rows) model_.kept()->restore_output(frame.kept_rows, activations.input_of(first_layer));
  ForestAttention attention(backend_, forest, transformer_.attention_scale());
  transformer_.forward(forest.ids, forest.positions, attention, activations, cancel_, kWork, first_layer);
  const auto wanted = [&](const Tensor& x) { return x.rows(activations.first_wanted, tokens); };
  transformer_.final_norm(wanted(activations.output), wanted(hidden), wanted(activations.output_rstd));

  Held held{ancestors + tokens, activations, std::vector<Tensor>(activations.layers.size())};
  if (!frame.frame->children.empty()) {
    for (size_t layer = first_layer; layer < activations.layers.size(); ++layer) {
      held.dqkv[layer] = take_dqkv(held.tokens);
    }
    run_children(held);
    if (!result_.finite) return;
  }

  cancel_.check(kWork);
  const Tensor dhidden = arena_.take(config.dtype, {tokens, config.hidden_size});
  if (!add_loss(frame.loss_rows, frame.frame->begin, hidden, dhidden)) return;
  const BackwardBuffers buffers = transformer_.make_backward_buffers(arena_, frame.dx, ancestors);
  transformer_.backward_final_norm(dhidden, activations.output, activations.output_rstd,
                                   activations.first_wanted, frame.dx);
  for (size_t layer = activations.layers.size(); layer-- > first_layer;) {
    transformer_.backward_layer(layer, forest, activations, buffers, held.dqkv[layer],
                                above ? above->dqkv[layer] : Tensor(), cancel_);
  }
}

// For the gradients of keys and values that come from tokens behind these: 0.
Tensor GradientPass::take_dqkv(int64_t tokens) {
  const Tensor dqkv = arena_.take(DType::f32, {tokens, model_.config().qkv_size()});
  backend_.zero(dqkv);
  return dqkv;
}

// Outputs that no query of these tokens has are 0.
void GradientPass::take_ancestors(size_t layer, const Activations& activations, const Activations* above) {
  const Activations::Layer& own = activations.layers[layer];
  const int64_t ancestors = activations.ancestors, unseen = ancestors + activations.first_row(layer);
  if (above != nullptr) backend_.copy(own.qkv.rows(0, ancestors), above->layers[layer].qkv);
  if (unseen > 0) backend_.zero(own.attention_output.rows(0, unseen));
}

std::vector<GradientPass::OpenFrame> GradientPass::open_kept(const std::vector<Frame>& frames,
                                                             const std::vector<int32_t>& rows,
                                                             int64_t ancestors) {
  std::vector<OpenFrame> all;
  for (const Frame& frame : frames) {
    if (!has_rows(frame)) continue;
    OpenFrame& opened = all.emplace_back(open(frame, ancestors));
    opened.kept_rows =
        model_.upload(std::vector<int32_t>(rows.begin() + frame.begin, rows.begin() + frame.end));
    opened.children = open_kept(frame.children, rows, ancestors + opened.forest.tokens);
  }
  return all;
}

void GradientPass::run_kept(const std::vector<Frame>& frames, const std::vector<int32_t>& rows) {
  const ArenaScope scope(arena_);
  const std::vector<OpenFrame> all = open_kept(frames, rows, 0);
  run_upper_layers(all, nullptr);
  if (!result_.finite) return;
  for (size_t layer = model_.kept()->layers(); layer-- > 0;) {
    for (const OpenFrame& frame : all) run_kept_layer(layer, frame, nullptr, Tensor());
    model_.kept()->release(layer);
  }
  backward_embeddings(all);
}

void GradientPass::run_upper_layers(const std::vector<OpenFrame>& frames, const Held* above) {
  for (const OpenFrame& frame : frames) {
    if (!result_.finite) return;
    run_layers(frame, above, model_.kept()->layers(),
               [&](const Held& held) { run_upper_layers(frame.children, &held); });
  }
}

void GradientPass::run_kept_layer(size_t layer, const OpenFrame& frame, const Activations* above,
                                  const Tensor& above_dqkv) {
  const ArenaScope scope(arena_);
  const Forest& forest = frame.forest;
  Activations activations =
      transformer_.make_activations(arena_, forest.tokens, Holds::one_layer, forest.ancestors);
  activations.first_wanted = frame.first_wanted;
  take_ancestors(layer, activations, above);
  model_.kept()->restore(layer, frame.kept_rows, activations);
  ForestAttention attention(backend_, forest, transformer_.attention_scale());
  transformer_.complete(layer, attention, activations);
  Tensor dqkv;
  if (!frame.children.empty()) {
    dqkv = take_dqkv(forest.ancestors + forest.tokens);
    for (const OpenFrame& child : frame.children) run_kept_layer(layer, child, &activations, dqkv);
  }
  const BackwardBuffers buffers = transformer_.make_backward_buffers(arena_, frame.dx, forest.ancestors);
  transformer_.backward_layer(layer, forest, activations, buffers, dqkv, above_dqkv, cancel_);
}

void GradientPass::backward_embeddings(const std::vector<OpenFrame>& frames) {
  for (const OpenFrame& frame : frames) {
    backward_embeddings(frame.children);
    transformer_.backward_embedding(frame.forest, frame.dx);
  }
}

bool GradientPass::add_loss(const std::vector<int32_t>& rows, int64_t begin, const Tensor& hidden,
                            const Tensor& dhidden) {
  // From here on it is too late to leave the gradients as they were.
  begun_ = true;
  if (rows.empty()) {
    backend_.zero(dhidden);
    return true;
  }
  const ArenaScope scope(arena_);
  const int64_t count = static_cast<int64_t>(rows.size());
  std::vector<int32_t> sources = picked(batch_.source_rows, rows);
  for (int32_t& source : sources) source -= static_cast<int32_t>(begin);
  const LossRows loss_rows{
      model_.upload(picked(loss_.weights, rows)), model_.upload(picked(loss_.advantages, rows)),
      model_.upload(picked(loss_.old_logprobs, rows)), model_.upload(picked(loss_.reference_logprobs, rows)),
      model_.upload(renumbered(picked(loss_.sequences, rows)))};
  const Tensor logprobs = arena_.take(DType::f32, {count}), entropies = arena_.take(DType::f32, {count});
  Parameter& head = model_.parameters().head();
  const double loss =
      backend_.head_loss(hidden, *head.packed, sources, picked(batch_.targets, rows), loss_rows,
                         loss_.options, logprobs, entropies, dhidden, head.gradient);
  result_.loss += loss;
  result_.finite = std::isfinite(loss);
  const auto scatter = [&](const Tensor& from, std::vector<float>& to) {
    std::vector<float> values(rows.size());
    backend_.download(values.data(), from, from.bytes());
    for (size_t i = 0; i < rows.size(); ++i) to[static_cast<size_t>(rows[i])] = values[i];
  };
  scatter(logprobs, result_.scores.logprobs);
  scatter(entropies, result_.scores.entropies);
  return result_.finite;
}

}  // namespace merf
