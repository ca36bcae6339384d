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
    if (result_.finite && has_rows(frame)) run_frame(frame, above);
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

void GradientPass::run_frame(const Frame& frame, const Held* above) {
  cancel_.check(kWork);
  const ArenaScope scope(arena_);
  const ModelConfig& config = model_.config();
  const int64_t tokens = frame.end - frame.begin, ancestors = above ? above->tokens : 0;
  const Forest forest = upload_forest(frame.begin, frame.end, ancestors);
  const Tensor hidden = arena_.take(config.dtype, {tokens, config.hidden_size});
  Activations activations = transformer_.make_activations(arena_, tokens, Holds::all_layers, ancestors);
  const std::vector<int32_t> rows = rows_of(frame.begin, frame.end);
  activations.first_wanted = first_source(rows, frame);
  for (size_t layer = 0; layer < activations.layers.size(); ++layer) {
    const Activations::Layer& own = activations.layers[layer];
    if (above) backend_.copy(own.qkv.rows(0, ancestors), above->activations.layers[layer].qkv);
    const int64_t unseen = ancestors + activations.first_row(layer);
    if (unseen > 0) backend_.zero(own.attention_output.rows(0, unseen));
  }
  ForestAttention attention(backend_, forest, transformer_.attention_scale());
  transformer_.forward(forest.ids, forest.positions, attention, activations, cancel_, kWork);
  const auto wanted = [&](const Tensor& x) { return x.rows(activations.first_wanted, tokens); };
  transformer_.final_norm(wanted(activations.output), wanted(hidden), wanted(activations.output_rstd));

  Held held{ancestors + tokens, activations, {}};
  if (!frame.children.empty()) {
    for (size_t layer = 0; layer < activations.layers.size(); ++layer) {
      held.dqkv.push_back(arena_.take(DType::f32, {held.tokens, config.qkv_size()}));
      backend_.zero(held.dqkv.back());
    }
    run_all(frame.children, &held);
    if (!result_.finite) return;
  }

  cancel_.check(kWork);
  const Tensor dhidden = arena_.take(config.dtype, {tokens, config.hidden_size});
  if (!add_loss(rows, frame.begin, hidden, dhidden)) return;
  const Tensor dx = arena_.take(DType::f32, {tokens, config.hidden_size});
  const BackwardBuffers buffers = transformer_.make_backward_buffers(arena_, dx, ancestors);
  transformer_.backward_final_norm(dhidden, activations.output, activations.output_rstd,
                                   activations.first_wanted, dx);
  for (size_t layer = activations.layers.size(); layer-- > 0;) {
    transformer_.backward_layer(layer, forest, activations, buffers,
                                held.dqkv.empty() ? Tensor() : held.dqkv[layer],
                                above ? above->dqkv[layer] : Tensor(), cancel_);
  }
  transformer_.backward_embedding(forest, dx);
}

// A frame between the layers.
struct GradientPass::KeptFrame {
  int64_t ancestors = 0;
  int64_t first_wanted = 0;
  Forest forest;
  Tensor rows;  // [tokens] i32, of the kept forward
  Tensor dx;    // [tokens, H] f32
  std::vector<KeptFrame> children;
};

std::vector<GradientPass::KeptFrame> GradientPass::begin_kept(const std::vector<Frame>& frames,
                                                              const std::vector<int32_t>& kept_rows,
                                                              int64_t ancestors) {
  const ModelConfig& config = model_.config();
  std::vector<KeptFrame> all;
  for (const Frame& frame : frames) {
    if (!result_.finite || !has_rows(frame)) continue;
    cancel_.check(kWork);
    const int64_t tokens = frame.end - frame.begin;
    const std::vector<int32_t> rows = rows_of(frame.begin, frame.end);
    KeptFrame& kept = all.emplace_back();
    kept.ancestors = ancestors;
    kept.first_wanted = first_source(rows, frame);
    kept.forest = upload_forest(frame.begin, frame.end, ancestors);
    kept.rows =
        model_.upload(std::vector<int32_t>(kept_rows.begin() + frame.begin, kept_rows.begin() + frame.end));
    kept.dx = arena_.take(DType::f32, {tokens, config.hidden_size});
    kept.children = begin_kept(frame.children, kept_rows, ancestors + tokens);
    if (!result_.finite) return all;

    const ArenaScope scope(arena_);
    const Tensor output = arena_.take(DType::f32, {tokens, config.hidden_size});
    const Tensor rstd = arena_.take(DType::f32, {tokens});
    const Tensor hidden = arena_.take(config.dtype, {tokens, config.hidden_size});
    const Tensor dhidden = arena_.take(config.dtype, {tokens, config.hidden_size});
    const auto wanted = [&](const Tensor& x) { return x.rows(kept.first_wanted, tokens); };
    model_.kept()->restore_output(kept.rows, output);
    transformer_.final_norm(wanted(output), wanted(hidden), wanted(rstd));
    if (!add_loss(rows, frame.begin, hidden, dhidden)) return all;
    transformer_.backward_final_norm(dhidden, output, rstd, kept.first_wanted, kept.dx);
  }
  return all;
}

void GradientPass::run_kept(const std::vector<Frame>& frames, const std::vector<int32_t>& rows) {
  const ArenaScope scope(arena_);
  const std::vector<KeptFrame> all = begin_kept(frames, rows, 0);
  if (!result_.finite) return;
  for (size_t layer = static_cast<size_t>(model_.config().layers); layer-- > 0;) {
    for (const KeptFrame& kept : all) run_kept_layer(layer, kept, nullptr, Tensor());
    model_.kept()->release(layer);
  }
  end_kept(all);
}

void GradientPass::end_kept(const std::vector<KeptFrame>& frames) {
  for (const KeptFrame& kept : frames) {
    end_kept(kept.children);
    transformer_.backward_embedding(kept.forest, kept.dx);
  }
}

void GradientPass::run_kept_layer(size_t layer, const KeptFrame& kept, const Activations* above,
                                  const Tensor& above_dqkv) {
  const ArenaScope scope(arena_);
  const int64_t tokens = kept.forest.tokens, ancestors = kept.ancestors;
  Activations activations = transformer_.make_activations(arena_, tokens, Holds::one_layer, ancestors);
  activations.first_wanted = kept.first_wanted;
  const Activations::Layer& own = activations.layers[layer];
  if (above != nullptr) backend_.copy(own.qkv.rows(0, ancestors), above->layers[layer].qkv);
  const int64_t unseen = ancestors + activations.first_row(layer);
  if (unseen > 0) backend_.zero(own.attention_output.rows(0, unseen));
  model_.kept()->restore(layer, kept.rows, activations);
  ForestAttention attention(backend_, kept.forest, transformer_.attention_scale());
  transformer_.complete(layer, attention, activations);
  Tensor dqkv;
  if (!kept.children.empty()) {
    dqkv = arena_.take(DType::f32, {ancestors + tokens, model_.config().qkv_size()});
    backend_.zero(dqkv);
    for (const KeptFrame& child : kept.children) run_kept_layer(layer, child, &activations, dqkv);
  }
  const BackwardBuffers buffers = transformer_.make_backward_buffers(arena_, kept.dx, ancestors);
  transformer_.backward_layer(layer, kept.forest, activations, buffers, dqkv, above_dqkv, cancel_);
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
