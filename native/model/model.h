// A model with its parameters: scores tokens, accumulates gradients, updates itself. Every method runs on the one
// thread that owns the backend.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "model/arena.h"
#include "model/cancel.h"
#include "model/config.h"
#include "model/frames.h"
#include "model/kept_forward.h"
#include "model/parameters.h"
#include "model/transformer.h"
#include "model/weights_file.h"

namespace merf {

// A packed forest of T tokens, and R rows of it that predict a token. Key j is visible to query i exactly when
// j <= i < visible_until[j]; row r asks for the log-probability of targets[r] after token source_rows[r].
struct Batch {
  std::vector<int32_t> tokens, positions, visible_until;  // [T]
  std::vector<int32_t> source_rows, targets;              // [R]
};

// The loss over a batch's R rows; see LossOptions and LossRows in backend/backend.h.
struct BatchLoss {
  LossOptions options;
  std::vector<float> weights, advantages, old_logprobs, reference_logprobs;
  std::vector<int32_t> sequences;
};

struct Scores {
  std::vector<float> logprobs, entropies;  // [R]
};

struct LossResult {
  double loss = 0.0;
  bool finite = true;
  Scores scores;
};

struct OptimizerOptions {
  float learning_rate = 1e-6f;
  float beta1 = 0.9f;
  float beta2 = 0.999f;
  float epsilon = 1e-8f;
  float weight_decay = 0.0f;
  float max_gradient_norm = 0.0f;  // 0: no clipping
};

struct OptimizerResult {
  double gradient_norm = 0.0;
  bool applied = false;
};

// merged: the value as a model without adapters has it, for reading.
enum class ParameterKind : uint8_t { value, gradient, adam_m, adam_v, merged };

class Model {
 public:
  // Models that run on one thread may share an arena.
  Model(Backend& backend, Arena& arena, ModelConfig config, const Training& training);
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const ModelConfig& config() const { return config_; }
  Parameters& parameters() { return parameters_; }
  Transformer& transformer() { return transformer_; }
  Backend& backend() { return backend_; }
  Arena& arena() { return arena_; }
  // What runs the steps of this model's rollouts; its recordings outlive them.
  Recorder& recorder();

  // Where memory runs out, every method gives back what it took and throws OUT_OF_MEMORY; those that take a batch say
  // how many tokens would have fitted.

  // Fills every parameter but adapters from files. Throws INVALID_ARGUMENT where a parameter is missing, given twice, unknown or
  // of another shape, and what read_tensor throws. After a failure the model has to be loaded again.
  void load(const std::vector<TensorSource>& sources, const Cancel& cancel);
  // Matrices from a normal distribution, norms 1, biases 0; a function of the seed alone.
  void initialize(uint64_t seed, float standard_deviation);
  std::vector<float> read(const std::string& name, ParameterKind kind);
  void write(const std::string& name, ParameterKind kind, const std::vector<float>& data);

  // [R, V] row-major, for tests and small uses.
  std::vector<float> logits(const Batch& batch, const Cancel& cancel);
  Scores score(const Batch& batch, const Cancel& cancel);
  // Adds to the gradients. Where the loss is not finite, the call is cancelled or memory runs out, they are as before
  // the call, or zero if any had been added to. `max_tokens` (0: no bound) is the most tokens whose activations are
  // held at once, as far as segments divide it (frames.h); the gradients do not depend on it but in their rounding.
  LossResult forward_backward(const Batch& batch, const BatchLoss& loss, int64_t max_tokens,
                              const Cancel& cancel);
  void zero_gradients();
  // Clips, updates and zeroes the gradients. Not applied where their norm is not finite. `step` is 1 at the first
  // update.
  OptimizerResult optim_step(const OptimizerOptions& options, int64_t step);

  // What a rollout leaves for forward_backward, which uses it for frames all of whose tokens it has. Emptied at the next
  // change of a weight, and where gradients that it stands in are wanted.
  void keep(std::unique_ptr<KeptForward> kept) { kept_ = std::move(kept); }
  std::unique_ptr<KeptForward> take_kept() { return std::move(kept_); }
  KeptForward* kept() { return kept_.get(); }
  // By layer, the memory of gradients that are 0, for a KeptForward to stand in; empty where they are not.
  std::vector<Tensor> lend_gradients();

  // Brings what operators read up to date with the values that were written; every method that needs it calls it.
  void prepare();
  // Names the weights as they are: another number after every change.
  uint64_t weights_version() const { return weights_version_; }

  // Uploads into the arena.
  Tensor upload(const std::vector<int32_t>& data);
  Tensor upload(const std::vector<float>& data);
  Forest upload_forest(const std::vector<int32_t>& tokens, const std::vector<int32_t>& positions,
                       const std::vector<int32_t>& visible_until);

 private:
  // Runs work over a batch of so many tokens, which takes `bytes` of the arena; `trains` where it is kept for a backward.
  template <class Work>
  auto within_memory(int64_t tokens, bool trains, int64_t bytes, const Work& work);
  void give_back_gradients();
  int64_t activation_bytes(int64_t tokens, Holds holds, size_t first_layer = 0) const;
  int64_t kept_activation_bytes(const std::vector<Frame>& frames) const;
  Error out_of_memory(const Error& error, int64_t tokens, bool trains);
  std::vector<float> compute_logits(const Batch& batch, const Cancel& cancel);
  Scores compute_scores(const Batch& batch, const Cancel& cancel);
  Tensor hidden_of(const Forest& forest, const Cancel& cancel, const char* work);
  void require_trainable(const char* what) const;
  // Before a change of a weight: what was computed with it goes.
  void change_weights();
  void initialize_adapters(uint64_t seed);

  Backend& backend_;
  Arena& arena_;
  const ModelConfig config_;
  Parameters parameters_;
  Transformer transformer_;
  bool accumulates_ = false;  // the gradients are not 0
  std::unique_ptr<KeptForward> kept_;
  std::unique_ptr<Recorder> recorder_;
  bool stale_ = true;  // the packed weights do not hold `value`
  uint64_t weights_version_ = 0;
};

}  // namespace merf
