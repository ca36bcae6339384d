// A model's parameters: what the products read, what the optimiser updates, and the names that Hugging Face
// gives to their parts.
//
// q, k and v are one weight [(q heads + 2 kv heads) * head_size, H], gate and up are one weight [2F, H], so
// that each is one product; their parts are slices of rows.
#pragma once

#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "model/arena.h"
#include "model/cancel.h"
#include "model/config.h"

namespace merf {

// What of a model is trained.
struct Training {
  // Not trainable: nothing; there are no gradients and no moments.
  Training(bool trainable = true) : trainable(trainable) {}  // NOLINT: a yes or no says it all
  static Training lora(int64_t rank, uint64_t seed) {
    Training training;
    training.lora_rank = rank;
    training.lora_seed = seed;
    return training;
  }
  bool trainable;
  // Above 0: low-rank adapters on the projections of all layers, and nothing else (LoRA, Hu et al. 2021).
  int64_t lora_rank = 0;
  uint64_t lora_seed = 0;  // of the first values of every A
};

// One stored parameter. `value` is the float32 master, or of the model's dtype where it is a matrix that is
// not trained. A matrix is kept in its packed form alone, with the lower half of its master (halves.h) where
// products read it in bfloat16: `value` is empty then, but for the time between writing and the next use.
struct Parameter {
  std::vector<int64_t> shape;  // [N, K] of a matrix, [N] of a bias or a norm's weight
  int64_t layer = -1;          // that it is a part of; -1: of none
  bool trained = false;        // has a gradient and moments
  DType dtype = DType::f32;    // of `value`
  Tensor value;
  Tensor lower;           // stored as bf16, as `packed` has the upper half; empty where that has all of it
  Tensor gradient;        // f32; made at the first backward
  Tensor adam_m, adam_v;  // f32; made at the first update
  std::unique_ptr<PackedWeight>
      packed;  // of the model's dtype, for products and, of the embedding, for lookups

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
  bool adapter = false;                     // one of LoRA's, which models are not loaded with
  const struct Adapter* adapted = nullptr;  // the adapter of the projection that this is a part of

  int64_t size() const {
    int64_t n = 1;
    for (int64_t d : shape) n *= d;
    return n;
  }
  bool decayed() const { return shape.size() == 2; }
  // This slice of one of the parameter's tensors.
  Tensor slice(const Tensor& whole) const { return whole.rows(first_row, first_row + shape[0]); }
};

// LoRA: y += (x A^T) B^T beside the frozen y = x W^T. One for each product, so q, k and v share an A, and
// gate and up. Its scale is 1 (alpha equals the rank).
struct Adapter {
  Parameter a;  // [rank, K], at first uniform in +-1 / sqrt(K)
  Parameter b;  // [N, rank], at first 0
};

// y = x W^T + bias, with its adapter where the model has them.
struct Projection {
  Parameter weight, bias;
  Adapter adapter;
};

struct LayerParameters {
  Parameter attention_norm;
  Projection qkv, output;
  Parameter mlp_norm;
  Projection gate_up, down;
};

// The names and shapes of the parameters of the model that `config` describes, with adapters of that rank
// where it is not 0. There need be no such model.
std::vector<NamedParameter> name_parameters(const ModelConfig& config, int64_t lora_rank = 0);

class Parameters {
 public:
  Parameters(Backend& backend, Arena& arena, const ModelConfig& config, const Training& training);

  Parameter embedding;
  std::vector<LayerParameters> layers;
  Parameter final_norm;
  Parameter untied_head;
  // The head's weight: the embedding's where the two are tied.
  Parameter& head() { return tied_ ? embedding : untied_head; }

  const std::vector<NamedParameter>& named() const { return named_; }
  // The parameters that are trained.
  const std::vector<Parameter*>& trained() const { return trained_; }
  const Training& training() const { return training_; }

  // Throws INVALID_ARGUMENT where there is no parameter of this name.
  const NamedParameter& find(const std::string& name) const;

  // `value` to write to; made from the packed form, or of zeros, where there is none.
  const Tensor& open_value(Parameter& parameter);
  // `value` to read, which may be made for this call.
  Tensor value_of(const Parameter& parameter) const;

  // Make what is missing, all of it or nothing, and fill it with zeros. Whether anything was missing. The
  // gradients of a layer lie in one piece.
  bool make_gradients();
  bool make_moments();
  void drop_gradients();
  // By layer, the memory of all its gradients, [elements] f32; empty tensors where nothing of it is trained.
  const std::vector<Tensor>& layer_gradients() const { return layer_gradients_; }
  bool has_gradients() const { return !trained_.empty() && trained_.front()->gradient; }
  int64_t trained_size() const;
  // Brings the copies that operators read (packed weights) up to date with `value`.
  void refresh(const Cancel* cancel = nullptr);
  void refresh(Parameter& parameter);

  // Float32 to and from a slice of a tensor of either type, through a bounded staging buffer.
  void write(const NamedParameter& named, const Tensor& whole, const float* data, int64_t first_element,
             int64_t elements);
  void read(const NamedParameter& named, const Tensor& whole, float* data);
  // The value as a model without adapters has it: W + B A.
  void read_merged(const NamedParameter& named, float* data);

  // One update of every parameter with the gradients times `options.gradient_scale`; weight decay on matrices
  // only.
  void update(const AdamWOptions& options, float weight_decay);
  void zero_gradients();

 private:
  void make_products(Parameter& parameter, const Tensor& source);

  Backend& backend_;
  const ModelConfig& config_;
  const Training training_;
  bool tied_;
  // Where matrices in training stand for a moment on their way from the master to their packed form, or from
  // there to the master and back; the largest has room in it.
  Arena& arena_;
  int64_t staged_size_ = 0;
  std::vector<Parameter*> all_, trained_;
  std::vector<Tensor> layer_gradients_;
  std::vector<NamedParameter> named_;
};

}  // namespace merf
