// The log-probabilities of a batch's rows at a temperature, micro-batch by micro-batch (micro_batches.h): a forward that keeps
// nothing but the keys and values of segments with others under them.
#pragma once

#include <vector>

#include "model/batch.h"
#include "model/model.h"

namespace merf {

class ScorePass {
 public:
  ScorePass(Model& model, const Batch& batch, float temperature, const Cancel& cancel);

  void run(const std::vector<MicroBatch>& micro_batches) { run_all(micro_batches, nullptr); }
  Scores result() { return std::move(scores_); }

  // Bytes of the arena that run takes at most, beside what is uploaded.
  static int64_t bytes(const Model& model, const std::vector<MicroBatch>& micro_batches,
                       int64_t ancestors = 0);

 private:
  // The keys and values of a micro-batch and of all above it, [tokens, (Hq + 2 Hk) D] by layer.
  struct Ancestors {
    int64_t tokens = 0;
    std::vector<Tensor> qkv;
  };
  void run_all(const std::vector<MicroBatch>& micro_batches, const Ancestors* above);
  // Scores a micro-batch's own rows, and leaves its keys and values in `own` where that has room for them.
  void run_one(const MicroBatch& micro_batch, const Ancestors* above, const Ancestors& own);

  Model& model_;
  Backend& backend_;
  Arena& arena_;
  Transformer& transformer_;
  const Batch& batch_;
  const float temperature_;
  const Cancel& cancel_;
  const BatchReader reader_;
  Scores scores_;
};

}  // namespace merf
