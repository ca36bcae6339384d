#include "model/activation_cache.h"

#include <array>

namespace merf {
namespace {

constexpr int64_t kAlignment = 256;  // bytes, as in the arena

uint64_t key_of(int32_t parent, int32_t token) {
  return static_cast<uint64_t>(static_cast<uint32_t>(parent + 1)) << 32 | static_cast<uint32_t>(token);
}

// One tensor of every layer: what a row of it takes.
struct Columns {
  DType dtype;
  int64_t count;
  int64_t bytes(int64_t rows) const {
    const int64_t bytes = rows * count * static_cast<int64_t>(size_of(dtype));
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
};
constexpr size_t kTensors = 3;
// In the order of ActivationCache::Layer.
std::array<Columns, kTensors> columns_of(const ModelConfig& config) {
  return {{{DType::f32, config.hidden_size},
           {config.dtype, config.qkv_size()},
           {config.dtype, 2 * config.mlp_size}}};
}

// The gradients that what is cached of a layer stands in; the first layer has none.
Tensor borrowed_by(size_t layer, const std::vector<Tensor>& gradients) {
  return gradients.empty() || layer == 0 ? Tensor() : gradients[layer - 1];
}

// The layer's tensors, a bit each, that fill the borrowed memory best.
unsigned best_fit(const std::array<Columns, kTensors>& columns, int64_t rows, const Tensor& borrowed) {
  if (!borrowed) return 0;
  unsigned best = 0;
  int64_t most = 0;
  for (unsigned chosen = 1; chosen < 1u << kTensors; ++chosen) {
    int64_t bytes = 0;
    for (size_t i = 0; i < kTensors; ++i) bytes += chosen >> i & 1 ? columns[i].bytes(rows) : 0;
    if (bytes <= static_cast<int64_t>(borrowed.bytes()) && bytes > most) {
      most = bytes;
      best = chosen;
    }
  }
  return best;
}

}  // namespace

ActivationCache::ActivationCache(Backend& backend, const ModelConfig& config, int64_t rows, size_t layers,
                                 std::vector<Tensor> gradients)
    : backend_(backend), rows_(rows), gradients_(std::move(gradients)), layers_in_use_(layers) {
  const auto columns = columns_of(config);
  for (size_t i = 0; i < layers; ++i) {
    const Tensor borrowed = borrowed_by(i, gradients_);
    const unsigned fits = best_fit(columns, rows, borrowed);
    Layer& layer = layers_.emplace_back();
    Tensor* const tensors[kTensors] = {&layer.attention_input, &layer.qkv, &layer.gate_up};
    int64_t begin = 0;  // floats of `borrowed` that are taken
    for (size_t t = 0; t < kTensors; ++t) {
      if (!(fits >> t & 1)) {
        *tensors[t] = backend.allocate(columns[t].dtype, {rows, columns[t].count});
        continue;
      }
      const int64_t end = begin + columns[t].bytes(rows) / static_cast<int64_t>(sizeof(float));
      *tensors[t] = borrowed.rows(begin, end);
      tensors[t]->dtype = columns[t].dtype;
      tensors[t]->rank = 2;
      tensors[t]->shape = {rows, columns[t].count, 1, 1};
      begin = end;
    }
  }
  output_ = backend.allocate(DType::f32, {rows, config.hidden_size});
}

ActivationCache::~ActivationCache() {
  try {
    clear();
  } catch (const Error&) {
    // The device has failed; whoever reads the gradients will be told.
  }
}

size_t ActivationCache::layers_within(int64_t bytes, const ModelConfig& config, int64_t rows,
                                      const std::vector<Tensor>& gradients) {
  const auto columns = columns_of(config);
  bytes -= rows * config.hidden_size * static_cast<int64_t>(sizeof(float));
  const size_t all = static_cast<size_t>(config.layers);
  for (size_t i = 0; i < all; ++i) {
    const unsigned fits = best_fit(columns, rows, borrowed_by(i, gradients));
    for (size_t t = 0; t < kTensors; ++t) bytes -= fits >> t & 1 ? 0 : columns[t].bytes(rows);
    if (bytes < 0) return i;
  }
  return all;
}

void ActivationCache::clear() {
  while (borrowing_ > 0) release(borrowing_ - 1);
  used_ = 0;
  row_of_.clear();
}

void ActivationCache::release(size_t layer) {
  if (layer >= borrowing_) return;
  borrowing_ = layer;
  if (const Tensor borrowed = borrowed_by(layer, gradients_)) backend_.zero(borrowed);
}

Activations ActivationCache::next(int64_t rows, const Activations& shared) {
  const int64_t first = advance(rows);
  const auto window = [&](const Tensor& all) { return all.rows(first, first + rows); };
  Activations a = shared;
  a.tokens = rows;
  a.saved_layers = layers_in_use_;
  for (size_t i = 0; i < layers_in_use_; ++i) {
    a.layers[i].attention_input = window(layers_[i].attention_input);
    a.layers[i].qkv = window(layers_[i].qkv);
    a.layers[i].gate_up = window(layers_[i].gate_up);
  }
  a.input_of(layers_in_use_) = window(output_);
  return a;
}

int64_t ActivationCache::advance(int64_t rows) {
  if (used_ + rows > rows_) {
    throw Error("INTERNAL", "Expected " + std::to_string(rows_) + " rows at most to be cached but received " +
                                std::to_string(used_ + rows));
  }
  if (borrows()) borrowing_ = layers_in_use_;
  used_ += rows;
  return used_ - rows;
}

void ActivationCache::stage(Arena& arena, int64_t rows, Activations& activations) const {
  const auto like = [&](const Tensor& all) { return arena.take(all.dtype, {rows, all.shape[1]}); };
  activations.saved_layers = layers_in_use_;
  for (size_t i = 0; i < layers_in_use_; ++i) {
    activations.layers[i].attention_input = like(layers_[i].attention_input);
    activations.layers[i].qkv = like(layers_[i].qkv);
    activations.layers[i].gate_up = like(layers_[i].gate_up);
  }
  activations.input_of(layers_in_use_) = like(output_);
}

std::vector<RowsCopy> ActivationCache::copies(const Activations& staged) const {
  std::vector<RowsCopy> all;
  for (size_t i = 0; i < layers_in_use_; ++i) {
    all.push_back({staged.layers[i].attention_input, layers_[i].attention_input});
    all.push_back({staged.layers[i].qkv, layers_[i].qkv});
    all.push_back({staged.layers[i].gate_up, layers_[i].gate_up});
  }
  all.push_back(
      {layers_in_use_ < staged.layers.size() ? staged.layers[layers_in_use_].attention_input : staged.output,
       output_});
  return all;
}

int32_t ActivationCache::set(int64_t row, int32_t parent, int32_t token) {
  return row_of_.emplace(key_of(parent, token), static_cast<int32_t>(row)).first->second;
}

std::vector<int32_t> ActivationCache::find(const std::vector<int32_t>& tokens,
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

void ActivationCache::restore_output(const Tensor& rows, const Tensor& x) const {
  backend_.gather_rows(output_, rows, x);
}

void ActivationCache::restore(size_t layer, const Tensor& rows, const Activations& activations) const {
  const Layer& from = layers_[layer];
  const Activations::Layer& to = activations.layers[layer];
  backend_.gather_rows(from.attention_input, rows, to.attention_input);
  backend_.gather_rows(from.qkv, rows, activations.own(to.qkv));
  backend_.gather_rows(from.gate_up, rows, to.gate_up);
}

}  // namespace merf
