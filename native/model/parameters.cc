#include "model/parameters.h"

#include <algorithm>

namespace merf {
namespace {

constexpr int64_t kStagedElements = int64_t{1} << 20;

// Walks over all parameters of a model in their fixed order, giving `visit` each stored parameter's slot
// together with its shape and its named slices (name and rows). One list serves allocation and naming.
struct Slice {
  std::string name;
  int64_t rows;
};
template <typename Visit>
void visit_parameters(const ModelConfig& c, int64_t lora_rank, Parameters* p, Visit visit) {
  using Shape = std::vector<int64_t>;
  using Slices = std::vector<Slice>;
  const int64_t h = c.hidden_size, q = c.attention_size(), kv = c.kv_heads * c.head_size, f = c.mlp_size;
  int64_t layer = -1;
  const auto add = [&](Parameter* parameter, const Shape& shape, const Slices& slices) {
    visit(parameter, shape, slices, nullptr, false, layer);
  };
  // A projection of `inputs` whose outputs are those of `parts` (module names) one after another.
  const auto add_projection = [&](Projection* projection, const std::string& fused_name, int64_t inputs,
                                  bool bias, const Slices& parts) {
    int64_t outputs = 0;
    Slices weights, biases;
    for (const Slice& part : parts) {
      outputs += part.rows;
      weights.push_back({part.name + ".weight", part.rows});
      biases.push_back({part.name + ".bias", part.rows});
    }
    const auto of = [&](Parameter Projection::*member) {
      return projection ? &(projection->*member) : nullptr;
    };
    Adapter* adapter = projection && lora_rank > 0 ? &projection->adapter : nullptr;
    visit(of(&Projection::weight), Shape{outputs, inputs}, weights, adapter, false, layer);
    if (bias) add(of(&Projection::bias), {outputs}, biases);
    if (lora_rank == 0) return;
    visit(adapter ? &adapter->a : nullptr, Shape{lora_rank, inputs},
          Slices{{fused_name + ".lora_A.weight", lora_rank}}, nullptr, true, layer);
    visit(adapter ? &adapter->b : nullptr, Shape{outputs, lora_rank},
          Slices{{fused_name + ".lora_B.weight", outputs}}, nullptr, true, layer);
  };
  add(p ? &p->embedding : nullptr, {c.vocab_size, h}, {{"model.embed_tokens.weight", c.vocab_size}});
  for (layer = 0; layer < c.layers; ++layer) {
    LayerParameters* l = p ? &p->layers[static_cast<size_t>(layer)] : nullptr;
    const std::string base = "model.layers." + std::to_string(layer) + ".";
    const std::string attention = base + "self_attn.", mlp = base + "mlp.";
    add(l ? &l->attention_norm : nullptr, {h}, {{base + "input_layernorm.weight", h}});
    add_projection(l ? &l->qkv : nullptr, attention + "qkv_proj", h, c.attention_bias,
                   {{attention + "q_proj", q}, {attention + "k_proj", kv}, {attention + "v_proj", kv}});
    add_projection(l ? &l->output : nullptr, attention + "o_proj", q, c.output_bias,
                   {{attention + "o_proj", h}});
    add(l ? &l->mlp_norm : nullptr, {h}, {{base + "post_attention_layernorm.weight", h}});
    add_projection(l ? &l->gate_up : nullptr, mlp + "gate_up_proj", h, c.mlp_bias,
                   {{mlp + "gate_proj", f}, {mlp + "up_proj", f}});
    add_projection(l ? &l->down : nullptr, mlp + "down_proj", f, c.mlp_bias, {{mlp + "down_proj", h}});
  }
  layer = -1;
  add(p ? &p->final_norm : nullptr, {h}, {{"model.norm.weight", h}});
  if (!c.tied_head) {
    add(p ? &p->untied_head : nullptr, {c.vocab_size, h}, {{"lm_head.weight", c.vocab_size}});
  }
}

void append_named(std::vector<NamedParameter>& named, Parameter* parameter, const std::vector<int64_t>& shape,
                  const std::vector<Slice>& slices, const Adapter* adapted, bool adapter) {
  int64_t first_row = 0;
  for (const Slice& slice : slices) {
    std::vector<int64_t> slice_shape = shape;
    slice_shape[0] = slice.rows;
    named.push_back({slice.name, std::move(slice_shape), parameter, first_row, adapter, adapted});
    first_row += slice.rows;
  }
}

Tensor allocate_like(Backend& backend, DType dtype, const std::vector<int64_t>& shape) {
  return shape.size() == 2 ? backend.allocate(dtype, {shape[0], shape[1]})
                           : backend.allocate(dtype, {shape[0]});
}

// A flat tensor's elements under a parameter's shape.
Tensor shaped_like(const Tensor& flat, const std::vector<int64_t>& shape) {
  return shape.size() == 2 ? flat.view({shape[0], shape[1]}) : flat;
}

// So that every gradient of a layer's begins at a multiple of 256 bytes.
int64_t round_up(int64_t elements) { return (elements + 63) / 64 * 64; }

// Elements [begin, begin + count) of a tensor as a flat one.
Tensor flat(const Tensor& tensor, int64_t begin, int64_t count) {
  return tensor.view({tensor.size()}).rows(begin, begin + count);
}

}  // namespace

std::vector<NamedParameter> name_parameters(const ModelConfig& config, int64_t lora_rank) {
  std::vector<NamedParameter> named;
  visit_parameters(
      config, lora_rank, nullptr,
      [&](Parameter*, const std::vector<int64_t>& shape, const std::vector<Slice>& slices, const Adapter*,
          bool adapter, int64_t) { append_named(named, nullptr, shape, slices, nullptr, adapter); });
  return named;
}

Parameters::Parameters(Backend& backend, Arena& arena, const ModelConfig& config, const Training& training)
    : layers(static_cast<size_t>(config.layers)),
      backend_(backend),
      config_(config),
      training_(training),
      tied_(config.tied_head),
      arena_(arena),
      layer_gradients_(layers.size()) {
  visit_parameters(
      config, training.lora_rank, this,
      [&](Parameter* parameter, const std::vector<int64_t>& shape, const std::vector<Slice>& slices,
          const Adapter* adapted, bool adapter, int64_t layer) {
        parameter->shape = shape;
        parameter->layer = layer;
        parameter->trained = training.trainable && (training.lora_rank == 0 || adapter);
        const bool f32 = parameter->trained || !parameter->matrix();
        parameter->dtype = f32 ? DType::f32 : config.dtype;
        all_.push_back(parameter);
        if (parameter->trained) trained_.push_back(parameter);
        if (parameter->trained && parameter->matrix())
          staged_size_ = std::max(staged_size_, parameter->size());
        append_named(named_, parameter, shape, slices, adapted, adapter);
      });
  // What is not written before it is used is 0.
  for (Parameter* parameter : all_) {
    if (!parameter->matrix()) open_value(*parameter);
  }
}

const Tensor& Parameters::open_value(Parameter& parameter) {
  parameter.value = value_of(parameter);
  return parameter.value;
}

Tensor Parameters::value_of(const Parameter& parameter) const {
  if (parameter.value) return parameter.value;
  const Tensor value = allocate_like(backend_, parameter.dtype, parameter.shape);
  if (parameter.lower) {
    const Tensor weight = allocate_like(backend_, config_.dtype, parameter.shape);
    backend_.unpack_weight(*parameter.packed, weight);
    backend_.join_master(weight, parameter.lower, value);
  } else if (parameter.packed) {
    backend_.unpack_weight(*parameter.packed, value);
  } else {
    backend_.zero(value);
  }
  return value;
}

const NamedParameter& Parameters::find(const std::string& name) const {
  for (const NamedParameter& named : named_) {
    if (named.name == name) return named;
  }
  throw Error("INVALID_ARGUMENT",
              "Expected the name of a parameter of this model for name but received " + name);
}

bool Parameters::make_gradients() {
  if (has_gradients() || trained_.empty()) return false;
  try {
    // The parameters of one layer follow each other.
    for (auto first = trained_.begin(), last = first; first != trained_.end(); first = last) {
      const int64_t layer = (*first)->layer;
      int64_t elements = 0;
      for (; last != trained_.end() && (*last)->layer == layer; ++last) elements += round_up((*last)->size());
      const Tensor block = backend_.allocate(DType::f32, {elements});
      backend_.zero(block);
      if (layer >= 0) layer_gradients_[static_cast<size_t>(layer)] = block;
      int64_t begin = 0;
      for (auto part = first; part != last; ++part) {
        (*part)->gradient = shaped_like(block.rows(begin, begin + (*part)->size()), (*part)->shape);
        begin += round_up((*part)->size());
      }
    }
  } catch (...) {
    drop_gradients();
    throw;
  }
  return true;
}

bool Parameters::make_moments() {
  std::vector<Tensor*> made;
  try {
    for (Parameter* parameter : trained_) {
      for (Tensor* moment : {&parameter->adam_m, &parameter->adam_v}) {
        if (*moment) continue;
        *moment = allocate_like(backend_, DType::f32, parameter->shape);
        made.push_back(moment);
        backend_.zero(*moment);
      }
    }
  } catch (...) {
    for (Tensor* moment : made) *moment = {};
    throw;
  }
  return !made.empty();
}

void Parameters::drop_gradients() {
  for (Parameter* parameter : trained_) parameter->gradient = {};
  for (Tensor& block : layer_gradients_) block = {};
}

int64_t Parameters::trained_size() const {
  int64_t elements = 0;
  for (const Parameter* parameter : trained_) elements += parameter->size();
  return elements;
}

void Parameters::zero_gradients() {
  for (Parameter* parameter : trained_) {
    if (parameter->gradient) backend_.zero(parameter->gradient);
  }
}

void Parameters::make_products(Parameter& parameter, const Tensor& source) {
  if (parameter.packed) {
    backend_.repack_weight(*parameter.packed, source);
  } else {
    const bool lookup = &parameter == &embedding;
    parameter.packed = backend_.pack_weight(source, training_.trainable && (!lookup || tied_), lookup);
  }
}

void Parameters::refresh(Parameter& parameter) {
  if (!parameter.matrix()) return;
  if (!parameter.value) {
    if (parameter.packed) return;
    open_value(parameter);
  }
  if (parameter.value.dtype == config_.dtype) {
    make_products(parameter, parameter.value);
    parameter.value = {};
    return;
  }
  const ArenaScope scope(arena_);
  const Tensor staged = arena_.take(config_.dtype, {parameter.shape[0], parameter.shape[1]});
  if (!parameter.lower) parameter.lower = allocate_like(backend_, DType::bf16, parameter.shape);
  backend_.split_master(parameter.value, staged, parameter.lower);
  make_products(parameter, staged);
  parameter.value = {};
}

void Parameters::refresh(const Cancel* cancel) {
  for (Parameter* parameter : all_) {
    if (cancel != nullptr) cancel->check("the packing of weights");
    refresh(*parameter);
  }
}

void Parameters::write(const NamedParameter& named, const Tensor& whole, const float* data,
                       int64_t first_element, int64_t elements) {
  const Tensor target = named.slice(whole);
  if (target.dtype == DType::f32) {
    backend_.upload(flat(target, first_element, elements), data,
                    static_cast<size_t>(elements) * sizeof(float));
    return;
  }
  const Tensor staged = backend_.allocate(DType::f32, {std::min(elements, kStagedElements)});
  for (int64_t begin = 0; begin < elements; begin += kStagedElements) {
    const int64_t count = std::min(kStagedElements, elements - begin);
    backend_.upload(staged.rows(0, count), data + begin, static_cast<size_t>(count) * sizeof(float));
    backend_.cast(flat(target, first_element + begin, count), staged.rows(0, count));
  }
}

void Parameters::read(const NamedParameter& named, const Tensor& whole, float* data) {
  const Tensor source = named.slice(whole);
  if (source.dtype == DType::f32) {
    backend_.download(data, source, source.bytes());
    return;
  }
  const int64_t elements = named.size();
  const Tensor staged = backend_.allocate(DType::f32, {std::min(elements, kStagedElements)});
  for (int64_t begin = 0; begin < elements; begin += kStagedElements) {
    const int64_t count = std::min(kStagedElements, elements - begin);
    backend_.cast(staged.rows(0, count), flat(source, begin, count));
    backend_.download(data + begin, staged.rows(0, count), static_cast<size_t>(count) * sizeof(float));
  }
}

void Parameters::read_merged(const NamedParameter& named, float* data) {
  const Tensor value = value_of(*named.parameter);
  if (named.adapted == nullptr) return read(named, value, data);
  const auto& [a, b] = *named.adapted;
  const Tensor weight = named.slice(value), low = named.slice(value_of(b));
  Tensor merged = backend_.allocate(DType::f32, {weight.shape[0], weight.shape[1]}), factor = low;
  if (weight.dtype == DType::f32) {
    backend_.copy(merged, weight);
  } else {
    backend_.cast(merged, weight);
  }
  if (low.dtype != a.packed->dtype) {
    factor = backend_.allocate(a.packed->dtype, {low.shape[0], low.shape[1]});
    backend_.cast(factor, low);
  }
  backend_.linear_backward_input(factor, *a.packed, merged, true);
  backend_.download(data, merged, merged.bytes());
}

void Parameters::update(const AdamWOptions& options, float weight_decay) {
  // Matrices that products read as they are move where they lie; of the others as many in one call as have
  // room for their copies.
  struct Staged {
    Parameter* parameter;
    Tensor copy;
  };
  std::vector<AdamWTensor> tensors;
  std::vector<Staged> copies;
  const ArenaScope scope(arena_);
  Tensor staging;
  int64_t staged = 0;
  const auto flush = [&] {
    backend_.adamw(tensors, options);
    for (const auto& [parameter, copy] : copies) make_products(*parameter, copy);
    tensors.clear();
    copies.clear();
    staged = 0;
  };
  const auto stage = [&](Parameter& parameter) {
    if (!staging) staging = arena_.take(config_.dtype, {staged_size_});
    if (staged + parameter.size() > staging.size()) flush();
    staged += parameter.size();
    const Tensor copy =
        staging.rows(staged - parameter.size(), staged).view({parameter.shape[0], parameter.shape[1]});
    backend_.unpack_weight(*parameter.packed, copy);
    copies.push_back({&parameter, copy});
    return copy;
  };
  for (Parameter* parameter : trained_) {
    Tensor weight;
    if (parameter->matrix()) {
      weight = backend_.packed_values(*parameter->packed);
      if (!weight) weight = stage(*parameter);
    }
    const Tensor master = parameter->lower ? parameter->lower : weight ? weight : parameter->value;
    tensors.push_back({master, parameter->lower ? weight : Tensor(), parameter->gradient, parameter->adam_m,
                       parameter->adam_v, parameter->matrix() ? weight_decay : 0.0f});
  }
  flush();
}

}  // namespace merf
