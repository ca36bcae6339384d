#include "model/transformer.h"

#include <cmath>

namespace merf {

namespace {

// The rows of x for the tokens from `first` on; x may be empty.
Tensor from_row(const Tensor& x, int64_t first) { return x && first > 0 ? x.rows(first, x.shape[0]) : x; }

AdaptedWeight weight_of(const Projection& projection) {
  return {projection.weight.packed.get(), projection.bias.value, projection.adapter.a.packed.get(),
          projection.adapter.b.packed.get()};
}

}  // namespace

void ForestAttention::attend(int64_t, const HeadsView& q, const HeadsView& k, const HeadsView& v,
                             const HeadsView& out, const Tensor& lse, int64_t first) {
  backend_.attention(q, k, v, forest_.visible_until, forest_.visible_until_host, scale_, out, lse,
                     forest_.ancestors + first);
}

void Activations::shrink_to(int64_t rows, Activations& out) const {
  const auto first = [rows](const Tensor& t) { return t ? t.rows(0, rows) : t; };
  out.tokens = rows;
  out.saved_layers = saved_layers;
  out.layers.resize(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& from = layers[i];
    Layer& to = out.layers[i];
    to.attention_input = first(from.attention_input);
    to.qkv = first(from.qkv);
    to.attention_output = first(from.attention_output);
    to.mlp_input = first(from.mlp_input);
    to.gate_up = first(from.gate_up);
  }
  out.normed = first(normed);
  out.gated = first(gated);
  out.low_rank = first(low_rank);
  out.squares = first(squares);
  out.output = first(output);
}

Transformer::Transformer(Backend& backend, const ModelConfig& config, Parameters& parameters)
    : backend_(backend), config_(config), parameters_(parameters) {
  inverse_frequencies_ = backend.allocate(DType::f32, {config.head_size / 2});
  backend.upload(inverse_frequencies_, config.inverse_frequencies.data(), inverse_frequencies_.bytes());
  attention_scale_ = 1.0f / std::sqrt(static_cast<float>(config.head_size));
}

Activations Transformer::make_activations(Arena& arena, int64_t tokens, SavedLayers saved, int64_t ancestors,
                                          size_t first_layer) const {
  const ModelConfig& c = config_;
  const bool saves = saved != SavedLayers::none;
  Activations a;
  a.tokens = tokens;
  a.ancestors = ancestors;
  a.layers.resize(static_cast<size_t>(c.layers));
  if (saves) a.saved_layers = a.layers.size();
  const auto residual = [&] { return arena.take(DType::f32, {tokens, c.hidden_size}); };
  const auto rstd = [&] { return saves ? arena.take(DType::f32, {tokens}) : Tensor(); };
  for (size_t i = first_layer; i < a.layers.size(); ++i) {
    if (saved != SavedLayers::all && i > 0) {
      a.layers[i] = a.layers[0];
      continue;
    }
    Activations::Layer& l = a.layers[i];
    l.attention_input = residual();
    l.attention_rstd = rstd();
    l.qkv = arena.take(c.dtype, {ancestors + tokens, c.qkv_size()});
    l.attention_output = arena.take(c.dtype, {ancestors + tokens, c.attention_size()});
    l.lse = arena.take(DType::f32, {c.heads, ancestors + tokens});
    l.mlp_input = saves ? residual() : l.attention_input;
    l.mlp_rstd = rstd();
    l.gate_up = arena.take(c.dtype, {tokens, 2 * c.mlp_size});
  }
  a.normed = arena.take(c.dtype, {tokens, c.hidden_size});
  a.gated = arena.take(c.dtype, {tokens, c.mlp_size});
  const int64_t rank = parameters_.training().lora_rank;
  if (rank > 0) a.low_rank = arena.take(c.dtype, {tokens, rank});
  if (!saves) {
    a.squares = arena.take(DType::f32, {tokens, (c.hidden_size + kSquaredColumns - 1) / kSquaredColumns});
  }
  if (saved == SavedLayers::one) return a;
  a.output = saves ? residual() : a.layers[0].attention_input;
  a.output_rstd = rstd();
  return a;
}

BackwardBuffers Transformer::make_backward_buffers(Arena& arena, const Tensor& dx, int64_t ancestors) const {
  const ModelConfig& c = config_;
  const int64_t tokens = dx.shape[0];
  BackwardBuffers b;
  b.dx = dx;
  b.dx_cast = c.dtype == DType::f32 ? b.dx : arena.take(c.dtype, {tokens, c.hidden_size});
  b.dnormed = arena.take(c.dtype, {tokens, c.hidden_size});
  b.dgated = arena.take(c.dtype, {tokens, c.mlp_size});
  const int64_t rank = parameters_.training().lora_rank;
  if (rank > 0) b.low_rank = arena.take(c.dtype, {tokens, rank});
  if (rank > 0) b.dlow_rank = arena.take(c.dtype, {tokens, rank});
  b.dgate_up = arena.take(c.dtype, {tokens, 2 * c.mlp_size});
  b.dattention = arena.take(c.dtype, {ancestors + tokens, c.attention_size()});
  b.dqkv = arena.take(c.dtype, {ancestors + tokens, c.qkv_size()});
  return b;
}

Transformer::Heads Transformer::split(const Tensor& qkv) const {
  const auto view = [&](int64_t first_head, int64_t heads) {
    HeadsView v;
    v.data = static_cast<char*>(qkv.data) +
             static_cast<size_t>(first_head * config_.head_size) * size_of(qkv.dtype);
    v.dtype = qkv.dtype;
    v.tokens = qkv.shape[0];
    v.heads = heads;
    v.head_size = config_.head_size;
    v.row_stride = qkv.shape[1];
    return v;
  };
  const int64_t q = config_.heads, kv = config_.kv_heads;
  return {view(0, q), view(q, kv), view(q + kv, kv), view(0, q + kv)};
}

HeadsView Transformer::whole_heads(const Tensor& x) const {
  return {x.data, x.dtype, x.shape[0], config_.heads, config_.head_size, x.shape[1]};
}

bool Transformer::add_product(const Projection& projection, const Tensor& x, const Activations& activations,
                              const Tensor& from, const Tensor& to, int64_t first) {
  return backend_.project_residual(from_row(x, first), weight_of(projection),
                                   from_row(activations.low_rank, first), from_row(from, first),
                                   from_row(to, first), from_row(activations.squares, first));
}

void Transformer::project_backward(const Projection& projection, const Tensor& dy, const Tensor& x,
                                   const BackwardBuffers& buffers, const Tensor& dx) {
  if (projection.weight.trained) {
    backend_.linear_backward_weight(dy, x, projection.weight.gradient, projection.bias.gradient);
  }
  backend_.linear_backward_input(dy, *projection.weight.packed, dx);
  if (!buffers.low_rank) return;
  const auto& [a, b] = projection.adapter;
  backend_.linear(x, *a.packed, Tensor(), buffers.low_rank);
  backend_.linear_backward_weight(dy, buffers.low_rank, b.gradient, Tensor());
  backend_.linear_backward_input(dy, *b.packed, buffers.dlow_rank);
  backend_.linear_backward_weight(buffers.dlow_rank, x, a.gradient, Tensor());
  backend_.linear_backward_input(buffers.dlow_rank, *a.packed, dx, true);
}

void Transformer::forward(const Tensor& ids, const Tensor& positions, AttentionStep& attention,
                          Activations& activations, const Cancel& cancel, const char* work,
                          size_t first_layer) {
  if (first_layer == 0) backend_.embedding(ids, *parameters_.embedding.packed, activations.input_of(0));
  bool squared = false;  // activations.squares are those of x
  const auto normed_rows = [&](const Tensor& x, const Parameter& norm, const Tensor& rstd, int64_t first) {
    return NormedRows{from_row(x, first),
                      squared ? from_row(activations.squares, first) : Tensor(),
                      norm.value,
                      config_.rms_norm_epsilon,
                      from_row(activations.normed, first),
                      from_row(rstd, first)};
  };
  for (size_t i = first_layer; i < activations.layers.size(); ++i) {
    cancel.check(work);
    const LayerParameters& p = parameters_.layers[i];
    const Activations::Layer& a = activations.layers[i];
    const int64_t layer = static_cast<int64_t>(i), first = activations.first_row(i);
    const CacheSlots cached = attention.cache_slots(layer);
    backend_.project_heads(
        normed_rows(a.attention_input, p.attention_norm, a.attention_rstd, 0), weight_of(p.qkv),
        activations.low_rank,
        {activations.own(a.qkv), config_.heads, config_.kv_heads, config_.head_size, positions,
         inverse_frequencies_, config_.rope_attention_scale, cached.cache, cached.slots});
    const Heads heads = split(a.qkv);
    attention.attend(layer, heads.q, heads.k, heads.v, whole_heads(a.attention_output), a.lse, first);
    squared = add_product(p.output, activations.own(a.attention_output), activations, a.attention_input,
                          a.mlp_input, first);
    backend_.project_gated(normed_rows(a.mlp_input, p.mlp_norm, a.mlp_rstd, first), weight_of(p.gate_up),
                           from_row(activations.low_rank, first), from_row(a.gate_up, first),
                           activations.saves(i), from_row(activations.gated, first));
    squared =
        add_product(p.down, activations.gated, activations, a.mlp_input, activations.input_of(i + 1), first);
  }
}

void Transformer::complete(size_t layer, AttentionStep& attention, const Activations& activations) {
  const LayerParameters& p = parameters_.layers[layer];
  const Activations::Layer& a = activations.layers[layer];
  const int64_t first = activations.first_row(layer);
  const auto norm = [&](const Tensor& x, const Parameter& weight, const Tensor& normed, const Tensor& rstd) {
    backend_.rms_norm(x, weight.value, config_.rms_norm_epsilon, normed, rstd);
  };
  norm(a.attention_input, p.attention_norm, activations.normed, a.attention_rstd);
  const Heads heads = split(a.qkv);
  attention.attend(static_cast<int64_t>(layer), heads.q, heads.k, heads.v, whole_heads(a.attention_output),
                   a.lse, first);
  add_product(p.output, activations.own(a.attention_output), activations, a.attention_input, a.mlp_input,
              first);
  norm(from_row(a.mlp_input, first), p.mlp_norm, from_row(activations.normed, first),
       from_row(a.mlp_rstd, first));
}

void Transformer::final_norm(const Tensor& x, const Tensor& hidden, const Tensor& rstd) {
  backend_.rms_norm(x, parameters_.final_norm.value, config_.rms_norm_epsilon, hidden, rstd);
}

void Transformer::head(const Tensor& hidden, const Tensor& logits) {
  backend_.linear(hidden, *parameters_.head().packed, Tensor(), logits);
}

void Transformer::backward_final_norm(const Tensor& dhidden, const Tensor& x, const Tensor& rstd,
                                      int64_t first, const Tensor& dx) {
  backend_.zero(dx);
  backend_.rms_norm_backward(from_row(dhidden, first), from_row(x, first), parameters_.final_norm.value,
                             from_row(rstd, first), from_row(dx, first), parameters_.final_norm.gradient);
}

void Transformer::backward_layer(size_t layer, const Forest& forest, const Activations& activations,
                                 const BackwardBuffers& buffers, const Tensor& through_children,
                                 const Tensor& of_ancestors, const Cancel& cancel) {
  const ModelConfig& c = config_;
  const float epsilon = c.rms_norm_epsilon;
  const Tensor none;
  const Tensor& dx = buffers.dx;
  const LayerParameters& p = parameters_.layers[layer];
  const Activations::Layer& a = activations.layers[layer];
  const int64_t ancestors = activations.ancestors, first = activations.first_row(layer);
  const auto cast_dx = [&] {
    if (buffers.dx_cast.data != dx.data) backend_.cast(buffers.dx_cast, dx);
  };
  const auto part = [first](const Tensor& x) { return from_row(x, first); };
  BackwardBuffers parts = buffers;
  for (Tensor* buffer : {&parts.dx, &parts.dx_cast, &parts.dnormed, &parts.dgated, &parts.low_rank,
                         &parts.dlow_rank, &parts.dgate_up}) {
    *buffer = part(*buffer);
  }
  const Tensor normed = part(activations.normed), gated = part(activations.gated);

  cancel.check_abandoned("the backward pass");
  cast_dx();
  backend_.swiglu(part(a.gate_up), gated);
  project_backward(p.down, parts.dx_cast, gated, parts, parts.dgated);
  backend_.swiglu_backward(parts.dgated, part(a.gate_up), parts.dgate_up);
  backend_.rms_norm(part(a.mlp_input), p.mlp_norm.value, epsilon, normed, none);
  project_backward(p.gate_up, parts.dgate_up, normed, parts, parts.dnormed);
  backend_.rms_norm_backward(parts.dnormed, part(a.mlp_input), p.mlp_norm.value, part(a.mlp_rstd), parts.dx,
                             p.mlp_norm.gradient);

  cancel.check_abandoned("the backward pass");
  cast_dx();
  project_backward(p.output, parts.dx_cast, part(activations.own(a.attention_output)), parts,
                   part(activations.own(buffers.dattention)));
  // Rows that no query of these tokens has a gradient of are 0.
  if (ancestors + first > 0) {
    backend_.zero(buffers.dattention.rows(0, ancestors + first));
    backend_.zero(buffers.dqkv.rows(0, ancestors + first));
  }
  const Heads heads = split(a.qkv), dheads = split(buffers.dqkv);
  const Tensor own_dqkv = activations.own(buffers.dqkv);
  backend_.attention_backward(whole_heads(buffers.dattention), heads.q, heads.k, heads.v,
                              whole_heads(a.attention_output), a.lse, forest.visible_until,
                              forest.visible_until_host, attention_scale_, dheads.q, dheads.k, dheads.v,
                              ancestors + first);
  if (through_children) backend_.add(buffers.dqkv, through_children);
  if (of_ancestors) backend_.add(of_ancestors, buffers.dqkv.rows(0, ancestors));
  backend_.rope(split(own_dqkv).qk, forest.positions, inverse_frequencies_, true, c.rope_attention_scale);
  backend_.rms_norm(a.attention_input, p.attention_norm.value, epsilon, activations.normed, none);
  project_backward(p.qkv, own_dqkv, activations.normed, buffers, buffers.dnormed);
  backend_.rms_norm_backward(buffers.dnormed, a.attention_input, p.attention_norm.value, a.attention_rstd, dx,
                             p.attention_norm.gradient);
}

void Transformer::backward_embedding(const Forest& forest, const Tensor& dx) {
  if (parameters_.embedding.trained) {
    backend_.embedding_backward(forest.ids, dx, parameters_.embedding.gradient, config_.padding_id);
  }
}

}  // namespace merf
