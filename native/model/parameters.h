// A model's parameters: what the products read, what the optimiser updates, and the names that Hugging Face gives
// to their parts.
//
// q, k and v are one weight [(q heads + 2 kv heads) * head_size, H], gate and up are one weight [2F, H], so that each
// is one product; their parts are slices of rows.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "model/config.h"

namespace merf {

// One stored parameter. `value` is what the other operators read: the float32 master itself, or in a bfloat16 model
// that is not trained a bfloat16 copy.
struct Parameter {
  std::vector<int64_t> shape;            // [N, K] of a matrix, [N] of a bias or a norm's weight
  Tensor value;                          // f32; matrices of a bf16 model that is not trained: bf16
  Tensor gradient;                       // f32; made at the first backward
  Tensor adam_m, adam_v;                 // f32; made at the first update
  Tensor table;                          // the embedding table that is looked up, of the model's dtype
  std::unique_ptr<PackedWeight> packed;  // of the model's dtype, for products

  bool matrix() const { return shape.size() == 2; }
  int64_t size() const {
    int64_t n = 1;
    for (int64_t d : shape) n *= d;
    return n;
  }
};

// A slice of a stored parameter under its Hugging Face name.
struct NamedParameter {
  std::string name;
  std::vector<int64_t> shape;
  Parameter* parameter = nullptr;
  int64_t first_row = 0;

  int64_t size() const {
    int64_t n = 1;
    for (int64_t d : shape) n *= d;
    return n;
  }
  bool decayed() const { return shape.size() == 2; }
  // This slice of one of the parameter's tensors.
  Tensor slice(const Tensor& whole) const { return whole.rows(first_row, first_row + shape[0]); }
};

struct LayerParameters {
  Parameter attention_norm, qkv, qkv_bias, output, output_bias;
  Parameter mlp_norm, gate_up, gate_up_bias, down, down_bias;
};

// The names and shapes of a model's parameters without the parameters: of what `config` describes.
std::vector<NamedParameter> name_parameters(const ModelConfig& config);

class Parameters {
 public:
  Parameters(Backend& backend, const ModelConfig& config, bool trainable);

  Parameter embedding;
  std::vector<LayerParameters> layers;
  Parameter final_norm;
  Parameter untied_head;
  // The head's weight: the embedding's where the two are tied.
  Parameter& head() { return tied_ ? embedding : untied_head; }

  const std::vector<NamedParameter>& named() const { return named_; }
  const std::vector<Parameter*>& all() const { return all_; }
  bool trainable() const { return trainable_; }

  // Throws INVALID_ARGUMENT where there is no parameter of this name.
  const NamedParameter& find(const std::string& name) const;

  // Makes what is missing and fills it with zeros.
  void make_gradients();
  void make_moments();
  // Brings the copies that operators read (packed weights, the embedding table) up to date with `value`.
  void refresh();

  // Float32 to and from a slice of a tensor of either type, through a bounded staging buffer.
  void write(const NamedParameter& named, const Tensor& whole, const float* data, int64_t first_element,
             int64_t elements);
  void read(const NamedParameter& named, const Tensor& whole, float* data);

  // One update of every parameter with the gradients times `options.gradient_scale`; weight decay on matrices only.
  void update(const AdamWOptions& options, float weight_decay);
  void zero_gradients();

 private:
  void refresh(Parameter& parameter);
  void make_products(Parameter& parameter, const Tensor& source);

  Backend& backend_;
  const ModelConfig& config_;
  bool trainable_;
  bool tied_;
  Tensor
      staging_;  // bf16 models in training: the largest matrix, on its way from the master into its packed form
  std::vector<Parameter*> all_;
  std::vector<NamedParameter> named_;
};

}  // namespace merf
