// The loss of a batch and its gradients, micro-batch by micro-batch (micro_batches.h).
#pragma once

#include <vector>

#include "model/batch.h"
#include "model/batch_loss.h"
#include "model/model.h"

namespace merf {

class GradientPass {
 public:
  GradientPass(Model& model, const Batch& batch, const BatchLoss& loss, const Cancel& cancel);

  // Adds the gradients of the micro-batches, until one's loss is not finite.
  void run(const std::vector<MicroBatch>& micro_batches) { run_all(micro_batches, nullptr); }
  // Does what run does, for micro-batches whose forward is in the model's activation cache, in rows[token].
  // They go together through the layers that it has, and no more than one of these layers is held at once. It
  // comes before run, since the cache stands in the gradients' memory.
  void run_cached(const std::vector<MicroBatch>& micro_batches, const std::vector<int32_t>& rows);
  LossResult result();

 private:
  struct Ancestors;
  struct OpenMicroBatch;
  void run_all(const std::vector<MicroBatch>& micro_batches, const Ancestors* above);
  OpenMicroBatch open(const MicroBatch& micro_batch, int64_t ancestors);
  std::vector<OpenMicroBatch> open_cached(const std::vector<MicroBatch>& micro_batches,
                                          const std::vector<int32_t>& rows, int64_t ancestors);
  // The micro-batch's forward from `first_layer` on, what is under it, its loss, and its backward to there.
  template <class Children>
  void run_layers(const OpenMicroBatch& micro_batch, const Ancestors* above, size_t first_layer,
                  const Children& run_children);
  Tensor take_dqkv(int64_t tokens);
  // Puts the keys and values of the micro-batches above in place, before a layer's forward.
  void take_ancestors(size_t layer, const Activations& activations, const Activations* above);
  void run_upper_layers(const std::vector<OpenMicroBatch>& micro_batches, const Ancestors* above);
  // Runs forward and backward of a layer that the activation cache has.
  void run_cached_layer(size_t layer, const OpenMicroBatch& micro_batch, const Activations* above,
                        const Tensor& above_dqkv);
  void backward_embeddings(const std::vector<OpenMicroBatch>& micro_batches);
  // Adds the loss of the micro-batch's rows and writes dhidden; returns whether it is finite.
  bool add_loss(const OpenMicroBatch& micro_batch, const Tensor& hidden, const Tensor& dhidden);

  Model& model_;
  Backend& backend_;
  Arena& arena_;
  Transformer& transformer_;
  const Batch& batch_;
  const BatchLoss& loss_;
  const Cancel& cancel_;
  const BatchReader reader_;
  LossResult result_;
};

}  // namespace merf
