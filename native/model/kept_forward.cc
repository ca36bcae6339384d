#include "model/kept_forward.h"

namespace merf {
namespace {

uint64_t key_of(int32_t parent, int32_t token) {
  return static_cast<uint64_t>(static_cast<uint32_t>(parent + 1)) << 32 | static_cast<uint32_t>(token);
}

}  // namespace

KeptForward::KeptForward(Backend& backend, const ModelConfig& config, int64_t rows)
    : backend_(backend), rows_(rows) {
  for (int64_t i = 0; i < config.layers; ++i) {
    layers_.push_back({backend.allocate(DType::f32, {rows, config.hidden_size}),
                       backend.allocate(config.dtype, {rows, config.qkv_size()}),
                       backend.allocate(DType::f32, {rows, config.hidden_size}),
                       backend.allocate(config.dtype, {rows, 2 * config.mlp_size})});
  }
  output_ = backend.allocate(DType::f32, {rows, config.hidden_size});
}

int64_t KeptForward::bytes_per_row(const ModelConfig& config) {
  const int64_t residual = 4 * config.hidden_size;
  const int64_t products =
      static_cast<int64_t>(size_of(config.dtype)) * (config.qkv_size() + 2 * config.mlp_size);
  return config.layers * (2 * residual + products) + residual;
}

Activations KeptForward::next(int64_t rows, const Activations& shared) {
  const auto window = [&](const Tensor& all) { return all.rows(used_, used_ + rows); };
  Activations a = shared;
  a.tokens = rows;
  a.layers.resize(layers_.size());
  for (size_t i = 0; i < layers_.size(); ++i) {
    a.layers[i].attention_input = window(layers_[i].attention_input);
    a.layers[i].qkv = window(layers_[i].qkv);
    a.layers[i].mlp_input = window(layers_[i].mlp_input);
    a.layers[i].gate_up = window(layers_[i].gate_up);
  }
  a.output = window(output_);
  used_ += rows;
  return a;
}

void KeptForward::set(int64_t row, int32_t parent, int32_t token) {
  row_of_.emplace(key_of(parent, token), static_cast<int32_t>(row));
}

std::vector<int32_t> KeptForward::find(const std::vector<int32_t>& tokens,
                                       const std::vector<int32_t>& visible_until) const {
  std::vector<int32_t> rows(tokens.size(), -1);
  for_each_token(visible_until, [&](int32_t i, int32_t parent) {
    const int32_t above = parent < 0 ? -1 : rows[static_cast<size_t>(parent)];
    if (parent >= 0 && above < 0) return;
    const auto found = row_of_.find(key_of(above, tokens[static_cast<size_t>(i)]));
    if (found != row_of_.end()) rows[static_cast<size_t>(i)] = found->second;
  });
  return rows;
}

void KeptForward::restore(const Tensor& rows, const Activations& activations) const {
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Activations::Layer& to = activations.layers[i];
    backend_.gather_rows(layers_[i].attention_input, rows, to.attention_input);
    backend_.gather_rows(layers_[i].qkv, rows, activations.own(to.qkv));
    backend_.gather_rows(layers_[i].mlp_input, rows, to.mlp_input);
    backend_.gather_rows(layers_[i].gate_up, rows, to.gate_up);
  }
  backend_.gather_rows(output_, rows, activations.output);
}

}  // namespace merf
