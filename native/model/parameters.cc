#include "model/parameters.h"

#include <algorithm>

namespace merf {
namespace {

constexpr int64_t kStagedElements = int64_t{1} << 20;

// Walks over all parameters of a model in their fixed order, giving `visit` each stored parameter's slot together
// with its shape and its named slices (name and rows). One list serves allocation and naming.
struct Slice {
  std::string name;
  int64_t rows;
};
template <typename Visit>
void visit_parameters(const ModelConfig& c, Parameters* p, Visit visit) {
  const int64_t h = c.hidden_size, q = c.attention_size(), kv = c.kv_heads * c.head_size, f = c.mlp_size;
  visit(p ? &p->embedding : nullptr, std::vector<int64_t>{c.vocab_size, h},
        std::vector<Slice>{{"model.embed_tokens.weight", c.vocab_size}});
  for (int64_t i = 0; i < c.layers; ++i) {
    LayerParameters* l = p ? &p->layers[static_cast<size_t>(i)] : nullptr;
    const std::string base = "model.layers." + std::to_string(i) + ".";
    const std::string attention = base + "self_attn.", mlp = base + "mlp.";
    visit(l ? &l->attention_norm : nullptr, std::vector<int64_t>{h},
          std::vector<Slice>{{base + "input_layernorm.weight", h}});
    visit(l ? &l->qkv : nullptr, std::vector<int64_t>{q + 2 * kv, h},
          std::vector<Slice>{{attention + "q_proj.weight", q},
                             {attention + "k_proj.weight", kv},
                             {attention + "v_proj.weight", kv}});
    if (c.attention_bias) {
      visit(l ? &l->qkv_bias : nullptr, std::vector<int64_t>{q + 2 * kv},
            std::vector<Slice>{{attention + "q_proj.bias", q},
                               {attention + "k_proj.bias", kv},
                               {attention + "v_proj.bias", kv}});
    }
    visit(l ? &l->output : nullptr, std::vector<int64_t>{h, q},
          std::vector<Slice>{{attention + "o_proj.weight", h}});
    if (c.output_bias) {
      visit(l ? &l->output_bias : nullptr, std::vector<int64_t>{h},
            std::vector<Slice>{{attention + "o_proj.bias", h}});
    }
    visit(l ? &l->mlp_norm : nullptr, std::vector<int64_t>{h},
          std::vector<Slice>{{base + "post_attention_layernorm.weight", h}});
    visit(l ? &l->gate_up : nullptr, std::vector<int64_t>{2 * f, h},
          std::vector<Slice>{{mlp + "gate_proj.weight", f}, {mlp + "up_proj.weight", f}});
    if (c.mlp_bias) {
      visit(l ? &l->gate_up_bias : nullptr, std::vector<int64_t>{2 * f},
            std::vector<Slice>{{mlp + "gate_proj.bias", f}, {mlp + "up_proj.bias", f}});
    }
    visit(l ? &l->down : nullptr, std::vector<int64_t>{h, f},
          std::vector<Slice>{{mlp + "down_proj.weight", h}});
    if (c.mlp_bias) {
      visit(l ? &l->down_bias : nullptr, std::vector<int64_t>{h},
            std::vector<Slice>{{mlp + "down_proj.bias", h}});
    }
  }
  visit(p ? &p->final_norm : nullptr, std::vector<int64_t>{h}, std::vector<Slice>{{"model.norm.weight", h}});
  if (!c.tied_head) {
    visit(p ? &p->untied_head : nullptr, std::vector<int64_t>{c.vocab_size, h},
          std::vector<Slice>{{"lm_head.weight", c.vocab_size}});
  }
}

void append_named(std::vector<NamedParameter>& named, Parameter* parameter, const std::vector<int64_t>& shape,
                  const std::vector<Slice>& slices) {
  int64_t first_row = 0;
  for (const Slice& slice : slices) {
    std::vector<int64_t> slice_shape = shape;
    slice_shape[0] = slice.rows;
    named.push_back({slice.name, std::move(slice_shape), parameter, first_row});
    first_row += slice.rows;
  }
}

Tensor allocate_like(Backend& backend, DType dtype, const std::vector<int64_t>& shape) {
  return shape.size() == 2 ? backend.allocate(dtype, {shape[0], shape[1]})
                           : backend.allocate(dtype, {shape[0]});
}

// Elements [begin, begin + count) of a tensor as a flat one.
Tensor flat(const Tensor& tensor, int64_t begin, int64_t count) {
  return tensor.view({tensor.size()}).rows(begin, begin + count);
}

}  // namespace

std::vector<NamedParameter> name_parameters(const ModelConfig& config) {
  std::vector<NamedParameter> named;
  visit_parameters(config, nullptr,
                   [&](Parameter*, const std::vector<int64_t>& shape, const std::vector<Slice>& slices) {
                     append_named(named, nullptr, shape, slices);
                   });
  return named;
}

Parameters::Parameters(Backend& backend, const ModelConfig& config, bool trainable)
    : layers(static_cast<size_t>(config.layers)),
      backend_(backend),
      config_(config),
      trainable_(trainable),
      tied_(config.tied_head) {
  int64_t largest = 0;
  visit_parameters(
      config, this,
      [&](Parameter* parameter, const std::vector<int64_t>& shape, const std::vector<Slice>& slices) {
        parameter->shape = shape;
        const bool f32 = trainable || !parameter->matrix();
        parameter->value = allocate_like(backend, f32 ? DType::f32 : config.dtype, shape);
        backend.zero(parameter->value);
        all_.push_back(parameter);
        if (parameter->matrix()) largest = std::max(largest, parameter->size());
        append_named(named_, parameter, shape, slices);
      });
  if (trainable && config.dtype != DType::f32) staging_ = backend.allocate(config.dtype, {largest});
}

const NamedParameter& Parameters::find(const std::string& name) const {
  for (const NamedParameter& named : named_) {
    if (named.name == name) return named;
  }
  throw Error("INVALID_ARGUMENT",
              "Expected the name of a parameter of this model for name but received " + name);
}

void Parameters::make_gradients() {
  for (Parameter* parameter : all_) {
    if (parameter->gradient) continue;
    parameter->gradient = allocate_like(backend_, DType::f32, parameter->shape);
    backend_.zero(parameter->gradient);
  }
}

void Parameters::make_moments() {
  for (Parameter* parameter : all_) {
    for (Tensor* moment : {&parameter->adam_m, &parameter->adam_v}) {
      if (*moment) continue;
      *moment = allocate_like(backend_, DType::f32, parameter->shape);
      backend_.zero(*moment);
    }
  }
}

void Parameters::zero_gradients() {
  for (Parameter* parameter : all_) {
    if (parameter->gradient) backend_.zero(parameter->gradient);
  }
}

void Parameters::make_products(Parameter& parameter, const Tensor& source) {
  if (&parameter == &embedding) {
    if (source.data == parameter.value.data) {
      parameter.table = parameter.value;
    } else {
      if (!parameter.table) parameter.table = allocate_like(backend_, config_.dtype, parameter.shape);
      backend_.copy(parameter.table, source);
    }
    if (!tied_) return;
  }
  if (parameter.packed) {
    backend_.repack_weight(*parameter.packed, source);
  } else {
    parameter.packed = backend_.pack_weight(source, trainable_);
  }
}

void Parameters::refresh(Parameter& parameter) {
  if (!parameter.matrix()) return;
  if (parameter.value.dtype == config_.dtype) {
    make_products(parameter, parameter.value);
    return;
  }
  const Tensor staged = staging_.rows(0, parameter.size()).view({parameter.shape[0], parameter.shape[1]});
  backend_.cast(staged, parameter.value);
  make_products(parameter, staged);
}

void Parameters::refresh() {
  for (Parameter* parameter : all_) refresh(*parameter);
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

void Parameters::update(const AdamWOptions& options, float weight_decay) {
  // As many parameters in one call as have room for their copies.
  std::vector<AdamWTensor> tensors;
  std::vector<Parameter*> matrices;
  int64_t staged = 0;
  const auto flush = [&] {
    backend_.adamw(tensors, options);
    size_t i = 0;
    for (const AdamWTensor& tensor : tensors) {
      if (tensor.master.rank != 2) continue;
      make_products(*matrices[i++], tensor.weight ? tensor.weight : tensor.master);
    }
    tensors.clear();
    matrices.clear();
    staged = 0;
  };
  for (Parameter* parameter : all_) {
    Tensor copy;
    if (parameter->matrix() && config_.dtype != DType::f32) {
      if (staged + parameter->size() > staging_.size()) flush();
      copy =
          staging_.rows(staged, staged + parameter->size()).view({parameter->shape[0], parameter->shape[1]});
      staged += parameter->size();
    }
    if (parameter->matrix()) matrices.push_back(parameter);
    tensors.push_back({parameter->value, copy, parameter->gradient, parameter->adam_m, parameter->adam_v,
                       parameter->matrix() ? weight_decay : 0.0f});
  }
  flush();
}

}  // namespace merf
